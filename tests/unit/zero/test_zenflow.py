# SPDX-License-Identifier: Apache-2.0
"""ZenFlow on one rank: against a plain float64 loop, and against plain offloading where the two are one."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops.adam import DeepSpeedCPUAdam, ZenFlowCPUAdam
from deepspeed.runtime.zenflow.columns import Columns, _cut, top_columns
from deepspeed.runtime.zenflow.settings import NEVER, Settings
from deepspeed.runtime.zero.host_worker import split_cores
from deepspeed.runtime.zero.offload_config import ZenFlowConfig
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.helpers.zenflow import Loop, batch, engine, loss_of, seen, train, weights

SLOW = {"topk_ratio": 0.3, "update_interval": 3, "select_strategy": "step", "select_interval": 6}


def check(made, loop):
    want = loop.run()
    shown = dict(zip(want, loop.shown, strict=True))
    for got, wanted in ((weights(made), want), (seen(made), shown)):
        for name, value in wanted.items():
            # fp32 against float64 over a dozen steps of a tenth of the weights' size
            torch.testing.assert_close(
                got[name].double(), value.detach(), rtol=2e-4, atol=2e-5, msg=name
            )
    made.destroy()


@pytest.mark.parametrize(
    ("stage", "section", "loop"),
    [
        (1, SLOW, Loop(choose=6)),
        (2, {**SLOW, "overlap_step": True}, Loop(choose=6, overlap=True)),
        (3, {**SLOW, "offload": True, "full_warm_up_rounds": 2}, Loop(choose=6, warm_up=2)),
        (3, {**SLOW, "topk_ratio": 0.0, "overlap_step": True}, Loop(0.0, choose=6, overlap=True)),
    ],
)
def test_columns_and_the_rest_step_as_in_a_plain_loop(stage, section, loop):
    made = engine(stage, {"zenflow": section})
    train(made)
    check(made, loop)


def test_clipping_and_accumulation_count_as_in_a_plain_loop():
    more = {"gradient_clipping": 0.7, "gradient_accumulation_steps": 2}
    made = engine(2, {"zenflow": SLOW}, **more)
    train(made)
    check(made, Loop(choose=6, clip=0.7, accumulation=2))


EVERY = {"update_interval": 1, "select_strategy": "step", "select_interval": 2}
FP16 = {"enabled": True, "initial_scale_power": 15, "loss_scale_window": 2, "hysteresis": 1}


@pytest.mark.parametrize(
    ("stage", "section", "more"),
    [
        (1, EVERY, {}),
        (2, {**EVERY, "full_warm_up_rounds": 3}, {"bf16": {"enabled": True}}),
        (3, EVERY, {"fp16": FP16, "gradient_clipping": 0.7}),
        (2, {"topk_ratio": 1.0}, {"fp16": FP16, "gradient_accumulation_steps": 2}),
        (3, {"topk_ratio": 1.0, "overlap_step": True}, {"bf16": {"enabled": True}}),
        (1, {"full_warm_up_rounds": 99, "overlap_step": True}, {}),
    ],
)
def test_without_waiting_the_bits_are_those_of_plain_offloading(stage, section, more):
    found = []
    for zero in ({}, {"zenflow": section}):
        made = engine(stage, zero, **more)
        losses = train(made)
        found.append((losses, made.skipped_steps, weights(made), seen(made)))
        made.destroy()
    plain, other = found
    assert plain[:2] == other[:2]
    assert (plain[1] > 0) is ("fp16" in more)
    for before, after in zip(plain[2:], other[2:], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_masters_are_read_and_set_whichever_side_steps_them():
    made = engine(3, {"zenflow": {**SLOW, "overlap_step": True}}, bf16={"enabled": True})
    train(made, last=4)
    other, param = made.module.last.weight, made.module.first.weight
    before = safe_get_full_fp32_param(other).clone()
    values = torch.arange(35.0).view(5, 7) / 3
    safe_set_full_fp32_param(param, values)
    assert torch.equal(safe_get_full_fp32_param(param), values)
    made.optimizer.param_groups[0]["lr"] = 0.0
    train(made, first=4, last=7)  # over an update
    assert torch.equal(safe_get_full_fp32_param(param), values)
    assert torch.equal(seen(made)["first.weight"], values.bfloat16().float())
    assert torch.equal(safe_get_full_fp32_param(other), before)
    made.destroy()


def test_the_rest_waits_by_itself_until_it_weighs_as_much_as_the_chosen():
    section = {"topk_ratio": 0.3, "auto_ratio": 1.0}
    never, at_once = {**section, "auto_ratio": 1.0}, {**section, "auto_ratio": 0.0}
    for zenflow, waits in ((never, True), (at_once, False)):
        made = engine(1, {"zenflow": zenflow})
        train(made, last=1)
        # one gradient of what was left weighs less than that of what was chosen for its weight
        assert bool(made.optimizer.order.counts.waiting) is waits
        train(made, first=1, last=20)
        assert made.optimizer.order.counts.updates > 0 or not waits
        made.destroy()


def test_blocks_cut_a_run_at_rows_and_columns_are_taken_and_put_back():
    matrix = torch.arange(28.0)  # 4 rows of 7
    blocks = _cut(0, 2, 5, 18, 7)  # elements 5 to 22, from place 2 of the part on
    assert [(b.start, b.rows, b.width, b.first) for b in blocks] == [
        (2, 1, 2, 5),
        (4, 2, 7, 0),
        (18, 1, 2, 0),
    ]
    part = torch.cat([torch.full((2,), -1.0), matrix[5:23]])
    columns = Columns.of_params(blocks, [torch.tensor([0, 5])])
    taken = columns.take(part)
    assert taken.tolist() == [5.0, 7.0, 12.0, 14.0, 19.0, 21.0]
    again = Columns.of_mask(blocks, columns.mask(20))
    again.put(part, -taken)
    assert torch.equal(part[2:].abs(), matrix[5:23]) and torch.equal(again.take(part), -taken)


def test_the_heaviest_columns_are_chosen_in_order():
    squares = torch.tensor([1.0, 9.0, 4.0, 9.0, 0.0])
    assert top_columns(squares, 0.4).tolist() == [1, 3]
    assert top_columns(squares, 0.5).tolist() == [1, 2, 3]
    assert top_columns(squares, 0.01).tolist() == [1]
    assert top_columns(squares, 0.0).tolist() == []


def test_words_of_the_section_become_numbers():
    epoch = ZenFlowConfig(select_strategy="epoch", select_interval=2, update_interval=4)
    assert (Settings.of(epoch, 5).choose_every, Settings.of(epoch, 5).update_every) == (10, 4)
    assert Settings.of(epoch, None).choose_every == NEVER
    auto = Settings.of(ZenFlowConfig(), None)
    assert (auto.update_every, auto.choose_every) == (0, NEVER) and auto.choose_updates < NEVER
    with pytest.raises(DeepSpeedConfigError, match="update_interval"):
        Settings.of(ZenFlowConfig(update_interval=0), None)


def test_training_data_says_how_long_an_epoch_is():
    import deepspeed
    from tests.helpers.zenflow import config, net

    data = [batch(step, 0, 0) for step in range(24)]
    section = {"select_strategy": "epoch", "update_interval": 1, "topk_ratio": 0.3}
    asked = config(1, {"zenflow": section}, gradient_accumulation_steps=2)
    made, _, loader, _ = deepspeed.initialize(model=net(), config=asked, training_data=data)
    assert len(loader) == 6 and made.optimizer.order.settings.choose_every == 3
    made.destroy()


def test_cores_are_shared_by_the_training_and_the_host_step():
    assert split_cores(range(8), 0.25) == ([2, 3, 4, 5, 6, 7], [0, 1])
    assert split_cores([3, 4], 0.0) == ([3, 4], [3, 4]) == split_cores([3, 4], 1.0)


def test_what_it_cannot_serve_is_refused_by_name():
    with pytest.raises(DeepSpeedConfigError, match=r"ZenFlow.*device memory.*offload_optimizer"):
        engine(2, {"zenflow": {}, "offload_optimizer": {"device": "none"}})
    with pytest.raises(DeepSpeedConfigError, match="50%"):
        engine(2, {"zenflow": {}, "offload_optimizer": {"device": "cpu", "ratio": 0.5}})
    lion = {"optimizer": {"type": "Lion", "params": {"lr": 0.1}}}
    with pytest.raises(DeepSpeedConfigError, match="DeepSpeedCPULion"):
        engine(2, {"zenflow": {}}, **lion)


def test_its_optimizer_is_the_plain_one_under_another_name():
    made = engine(2, {"zenflow": SLOW})
    assert type(made.optimizer.optimizer) is ZenFlowCPUAdam
    assert issubclass(ZenFlowCPUAdam, DeepSpeedCPUAdam)
    loss_of(made, *batch(0, 0, 0))
    made.destroy()
