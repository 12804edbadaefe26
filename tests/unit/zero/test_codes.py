# SPDX-License-Identifier: Apache-2.0
"""Codes of slices and of gradient rows: what they lose is bounded by the scale of each group."""

from __future__ import annotations

import pytest
import torch

from deepspeed import DeepSpeedConfigError
from deepspeed.runtime.build import build_plan
from deepspeed.runtime.memory_plan import plan_for, read_config
from deepspeed.runtime.zero.codec import SLICE_GROUP, SliceCodec
from deepspeed.runtime.zero.estimate import ModelSize
from deepspeed.runtime.zero.quantized_sum import GROUP, ErrorFeedback, QuantizedSum, RowCodec

STEPS = {8: 127, 4: 7}


def values_of(numel, dtype=torch.float32, spread=3):
    seed = torch.Generator().manual_seed(numel)
    sizes = 10.0 ** torch.randint(-spread, spread + 1, (numel // 64 + 1,), generator=seed)
    return (torch.randn(numel, generator=seed) * sizes.repeat_interleave(64)[:numel]).to(dtype)


def half_steps(values, group, bits):
    """For each value half a step of its group."""
    padded = torch.zeros(-(-values.numel() // group) * group)
    padded[: values.numel()] = values.float().abs()
    most = padded.view(-1, group).amax(1)
    return (most / STEPS[bits] / 2).repeat_interleave(group)[: values.numel()]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 7, 255, 256, 1000])
def test_a_slice_loses_at_most_half_a_step(numel, dtype, bits):
    values, codec = values_of(numel, dtype), SliceCodec(numel, dtype, bits)
    data = codec.encode(values)
    again = codec.decode(data)
    assert data.numel() == codec.nbytes and codec.nbytes % 4 == 0 and again.dtype == dtype
    group = min(SLICE_GROUP, -(-numel // 8) * 8)
    bound = half_steps(values, group, bits) * (1 + 2**-20)
    rounding = again.float().abs() * torch.finfo(dtype).eps
    assert ((again.float() - values.float()).abs() <= bound + rounding).all()


def test_codes_of_8_bits_take_a_quarter_of_the_bytes():
    assert SliceCodec(1 << 16, torch.float32).nbytes == pytest.approx((1 << 16) * 1.016, rel=1e-3)


@pytest.mark.parametrize(
    "values", [torch.zeros(300), torch.full((300,), 1e-30), torch.full((300,), 3e38)]
)
def test_zeros_and_extremes_keep_their_size(values):
    codec = SliceCodec(300, torch.float32)
    torch.testing.assert_close(codec.decode(codec.encode(values)), values, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_quantize_each_run_by_itself_and_leave_the_rest(bits):
    codec = RowCodec.of(900, [(100, 300), (405, 395)], bits)
    assert codec.runs == (
        (0, 100, False),
        (100, 300, True),
        (400, 5, False),
        (405, 395, True),
        (800, 100, False),
    )
    rows = torch.stack([values_of(900), values_of(901)[1:]])
    again = codec.decode(codec.encode(rows), torch.float32)
    for start, length, quantized in codec.runs:
        for row, back in zip(rows, again, strict=True):
            was, now = row[start : start + length], back[start : start + length]
            if quantized:
                assert not torch.equal(was, now)
                assert ((now - was).abs() <= half_steps(was, GROUP, bits) * (1 + 2**-20)).all()
            else:
                assert torch.equal(was, now)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad):
    rows = torch.ones(2, 200)
    rows[1, 150] = bad
    codec = RowCodec.of(200, [(0, 200)], 4)
    again = codec.decode(codec.encode(rows), torch.float32)
    assert again[0].isfinite().all() and not again[1].isfinite().all()


def sum_over_time(feedback, rounds=60):
    """What one rank would have sent of a constant gradient, added up."""
    codec, rows = RowCodec.of(200, [(0, 200)], 4), values_of(200, spread=0)[None]
    total = torch.zeros_like(rows)
    for _ in range(rounds):
        meant = rows if feedback is None else feedback.compensate(rows)
        sent = codec.decode(codec.encode(meant), torch.float32)
        if feedback is not None:
            feedback.learn(meant, sent)
        total += sent
    return (total / rounds - rows).abs().max().item()


def test_feedback_makes_up_for_what_was_lost():
    lost = sum_over_time(None)
    assert sum_over_time(ErrorFeedback(0.0, 1024)) < lost / 10
    assert sum_over_time(ErrorFeedback(0.8, 1024)) < lost / 3
    assert sum_over_time(ErrorFeedback(0.0, 1)) == pytest.approx(
        lost, rel=1e-3
    )  # forgotten each time


def test_feedback_learns_nothing_from_an_overflow():
    feedback = ErrorFeedback(0.0, 100)
    bad = torch.tensor([[1.0, float("inf")]])
    feedback.learn(feedback.compensate(bad), torch.tensor([[0.5, float("nan")]]))
    assert feedback.compensate(torch.zeros(1, 2)).tolist() == [[0.5, 0.0]]


def test_an_empty_sum_is_no_collective():
    empty = torch.empty(0)
    QuantizedSum(RowCodec.of(0, [], 4))(empty, empty, None)


def plan_of(**zero):
    return build_plan(read_config({"zero_optimization": {"stage": 3, **zero}}))


def test_what_a_configuration_says_of_codes():
    assert plan_of().gradient_bits == 0
    assert plan_of(zero_quantized_gradients=True).error_feedback is None
    both = plan_of(zero_quantized_gradients=True, zeropp_loco_param={"reset_T": 9})
    assert (both.gradient_bits, both.error_feedback) == (4, (0.8, 9))


@pytest.mark.parametrize("given", [{"err_beta": 1.0}, {"reset_T": 0}, {"beta": 0.5}])
def test_settings_of_the_feedback_are_checked(given):
    with pytest.raises(DeepSpeedConfigError, match="zeropp_loco_param"):
        plan_of(zero_quantized_gradients=True, zeropp_loco_param=given)


def rows_of(ranks=8, **zero):
    config = read_config({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, **zero}})
    plan = plan_for(config, ModelSize((8_000_000, 5), (16_000_000,), 16_000_000), ranks)
    return {row.role: row.nbytes for row in plan.rows if row.lasting}


def test_the_plan_counts_second_copies_and_errors():
    plain = rows_of()
    near = rows_of(zero_hpz_partition_size=4)
    # bf16, a quarter of each parameter, the small one filled up to a multiple of four
    assert near.pop("second copy of params") == 2 * (2_000_000 + 2 + 4_000_000)
    assert near == plain and plain["params"] == 2 * (1_000_000 + 1)
    assert rows_of(zero_hpz_partition_size=8) == plain  # all ranks: no second copy
    loco = rows_of(zero_quantized_gradients=True, zeropp_loco_param={})
    assert loco["errors of codes"] == 2 * 8_000_005
    assert rows_of(mics_shard_size=2)["params"] == 2 * (4_000_000 + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_is_decoded_wherever_its_runs_start(dtype):
    codec = RowCodec.of(310, [(5, 300)], 4)  # after 5 values of 2 bytes, scales start at byte 10
    rows = values_of(310, dtype, spread=1).view(1, -1)
    again = codec.decode(codec.encode(rows), dtype)
    assert torch.equal(again[:, :5], rows[:, :5].float())
    assert torch.equal(again[:, 305:], rows[:, 305:].float())
    bound = half_steps(rows[0, 5:305], GROUP, 4) * (1 + 2**-20)
    assert ((again - rows.float())[0, 5:305].abs() <= bound).all()
