# SPDX-License-Identifier: Apache-2.0
"""Masters, states and gradients of single parameters, whole, in one process."""

from __future__ import annotations

import pytest
import torch

from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from deepspeed.utils.tensor_fragment import (
    get_hp_fragment_mapping,
    link_hp_params,
    safe_get_local_fp32_param,
    safe_update_full_grad_vectorized,
)
from tests.helpers.checkpointing import engine, train


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_low_precision_weights_have_full_precision_masters(stage: int, ratio: float | None) -> None:
    if stage == 0 and ratio:
        pytest.skip("a partial ratio needs a sharded optimizer")
    zero = {"offload_optimizer": {"device": "cpu", "ratio": ratio}} if ratio else {}
    made = engine(stage, "bf16", zero=zero)
    before = {name: p.detach().float() for name, p in made.module.named_parameters()}
    for name, param in made.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(param).bfloat16().float(), before[name])
        assert safe_get_full_optimizer_state(param, "exp_avg") is None
        assert safe_get_full_grad(param) is None
    x = torch.arange(8) % 7
    made.backward(made(x, x))
    param = made.module.head.weight
    gradient = safe_get_full_grad(param).clone()  # at stage 0 it is the gradient itself
    assert gradient.shape == param.shape and gradient.any()
    safe_update_full_grad_vectorized([param], lambda grad, _: grad * 2)
    torch.testing.assert_close(safe_get_full_grad(param).float(), 2 * gradient.float())
    made.step()
    assert safe_get_full_optimizer_state(param, "exp_avg").any()
    assert float(safe_get_full_optimizer_state(param, "step")) == 1
    assert safe_get_full_optimizer_state(param, "nothing") is None
    assert torch.equal(safe_get_full_fp32_param(param).bfloat16(), param)


def test_plain_parameters_have_no_master() -> None:
    made = engine(0, "fp32")
    param = made.module.head.weight
    assert safe_get_full_fp32_param(param) is None
    assert safe_get_full_optimizer_state(param, "exp_avg") is None
    assert get_hp_fragment_mapping(param) is None
    assert safe_get_local_fp32_param(param) is None
    x = torch.arange(8) % 7
    made.backward(made(x, x))
    assert safe_get_full_grad(param) is param.grad
    safe_set_full_grad(param, torch.ones_like(param))
    assert param.grad.eq(1).all()


def test_linked_parameters_answer_for_themselves() -> None:
    made = engine(2, "bf16")
    train(made, 0, 1)
    params = list(made.module.parameters())
    link_hp_params(params)
    for param in params:
        assert torch.equal(param.get_full_hp_param(), safe_get_full_fp32_param(param))
        assert torch.equal(
            param.get_full_hp_param("exp_avg"), safe_get_full_optimizer_state(param, "exp_avg")
        )
        mapping = param._hp_mapping
        assert mapping.lp_fragment_address.numel == param.numel()
        assert torch.equal(mapping.hp_fragment.bfloat16(), mapping.lp_fragment)
    params[0].set_full_hp_param(torch.full_like(params[0], 3, dtype=torch.float32))
    assert params[0].eq(3).all() and params[0].get_full_hp_param().eq(3).all()


def test_values_of_another_shape_are_refused() -> None:
    made = engine(1, "fp32")
    train(made, 0, 1)
    param = made.module.head.weight
    with pytest.raises(ValueError, match="another shape"):
        safe_set_full_fp32_param(param, torch.ones(3))
    with pytest.raises(ValueError, match="another shape"):
        safe_set_full_optimizer_state(param, torch.ones(3), "exp_avg")
    with pytest.raises(KeyError, match="no such state"):
        safe_set_full_optimizer_state(param, torch.ones_like(param), "momentum")
