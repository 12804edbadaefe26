# SPDX-License-Identifier: Apache-2.0
"""Adam on chosen columns, and Adam that is ordered through shared memory."""

from __future__ import annotations

import threading

import pytest
import torch

from deepspeed.ops.adam import ZenFlowSelectiveAdamW, ZenFlowSelectiveAdamW_stage3
from deepspeed.ops.op_builder import CPUAdamBuilder


def sliced(param):
    """The param as its columns one behind the other, beginning at an element of the slice, as stage 3 has it."""
    param.ds_shape = (param.shape[1], param.shape[0])
    param.ds_tensor = torch.cat([torch.zeros(3), param.detach().T.reshape(-1)])
    param.complete_column_offset, param.complete_numel = 3, param.numel()


def columns_of(param, kind):
    if kind is ZenFlowSelectiveAdamW:
        return param.detach()
    return param.ds_tensor[3:].view(param.ds_shape).T


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", [ZenFlowSelectiveAdamW, ZenFlowSelectiveAdamW_stage3])
def test_chosen_columns_step_as_torch_steps_them_alone(kind, offload):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4, 6))
    rule = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1}
    chosen, rest = torch.tensor([1, 4]), [0, 2, 3, 5]
    alone = torch.nn.Parameter(param.detach()[:, chosen].clone())
    plain = torch.optim.AdamW([alone], **rule)
    untouched = param.detach()[:, rest].clone()
    sliced(param)
    optimizer = kind([param], offload=offload, bucket_size=1, **rule)
    for step in range(4):
        grad = torch.randn(4, 2)
        param.selected_indices = chosen
        param.selected_grad = grad if kind is ZenFlowSelectiveAdamW else grad.T.contiguous()
        alone.grad = grad
        plain.step()
        if step % 2:
            optimizer.group_step([param])
        else:
            optimizer.temp_copy_param([param])
            columns_of(param, kind)[:, chosen] = 7.0  # somebody writes over them; the copy counts
            optimizer.step()
            assert param.temp_selected_param is None
        assert param.selected_grad is None
        found = columns_of(param, kind)
        torch.testing.assert_close(found[:, chosen], alone.detach())
        assert torch.equal(found[:, rest], untouched)
    optimizer.clear_selected_mv()
    kept = [param.exp_avg_cpu_data] if offload else [optimizer.state[param]["exp_avg"]]
    assert not any(values.any() for values in kept)


def test_steps_ordered_through_shared_bytes_are_those_of_adam():
    op = CPUAdamBuilder().load()
    rule = (0.01, 0.9, 0.99, 1e-8, 0.1)
    op.create_adam(7, *rule, True, False)
    control = torch.zeros(op.zenflow_adam_ctrl_size(), dtype=torch.uint8)
    op.zenflow_adam_ctrl_init(control.data_ptr(), 1)
    torch.manual_seed(0)
    param, stale = torch.randn(37), torch.zeros(37)
    pairs = [[torch.zeros(37) for _ in range(2)] for _ in range(3)]
    want, moments = param.clone(), [[torch.zeros(37) for _ in range(2)] for _ in range(2)]
    handle = op.zenflow_adam_create(7, [])
    op.zenflow_adam_register_group(handle, param, *pairs[0], *pairs[1], *pairs[2], stale)
    given = (handle, control.data_ptr())
    worker = threading.Thread(target=op.zenflow_adam_run_worker, args=given, daemon=True)
    worker.start()
    assert op.zenflow_adam_wait(control.data_ptr(), 0.01) is False
    for step in range(1, 5):
        now, grad = step % 2, torch.randn(37)
        pairs[0][now].copy_(grad)
        op.zenflow_adam_submit(control.data_ptr(), now, step, *([value] for value in rule), [1])
        assert op.zenflow_adam_wait(control.data_ptr(), 30.0)
        op.adam_update(7, step, *rule, True, want, grad, moments[0][now], moments[1][now])
        assert torch.equal(param, want) and torch.equal(stale, want)
    op.zenflow_adam_ctrl_exit(control.data_ptr())
    worker.join(30)
    assert not worker.is_alive()
    op.zenflow_adam_destroy(handle)
    op.destroy_adam(7)
