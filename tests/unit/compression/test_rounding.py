# SPDX-License-Identifier: Apache-2.0
"""Fewer bits and best scores: against levels written out in float64, and gradients that pass through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepspeed.compression.basic_layer import QuantAct
from deepspeed.compression.utils import (
    AsymQuantizer,
    BinaryQuantizer,
    SymQuantizer,
    TernaryQuantizer,
    TopKBinarizer,
)
from deepspeed.runtime.quantize import Quantizer


def levels(row, bits, symmetric):
    """The nearest of all levels, by search: no rounding of our own."""
    low, high = row.min(), row.max()
    if symmetric:
        scale = 2 * max(abs(low), abs(high)) / 2**bits
        grid = scale * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    else:
        scale = (high - low) / 2**bits
        grid = scale * (np.arange(2**bits) + round(low / scale))
    return grid[np.abs(row[:, None] - grid).argmin(1)]


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_go_to_the_nearest_level_of_their_group(bits, groups, symmetric):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(bits), requires_grad=True)
    quantizer = SymQuantizer if symmetric else AsymQuantizer
    found = quantizer.apply(x, bits, None, None, groups)
    rows = x.detach().double().reshape(groups, -1).numpy()
    expected = np.stack([levels(row, bits, symmetric) for row in rows]).reshape(4, 6)
    # fp32 arithmetic on values of about 1; the grids differ by at least 2/256
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    weights = torch.arange(24.0).view(4, 6)
    (found * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_one_and_two_bits_are_signs_and_signs_of_what_is_large():
    x = torch.tensor([[1.0, -3.0, 0.1, 0.0], [2.0, 2.0, -8.0, 0.5]])
    mean = x.abs().mean(1, keepdim=True)
    assert torch.equal(BinaryQuantizer.apply(x, 1, None, None, 2), x.sign() * mean)
    # above 0.7 of the means 1.025 and 3.125: {1, 3}, mean 2, and {8}
    expected = torch.tensor([[2.0, -2.0, 0.0, 0.0], [0.0, 0.0, -8.0, 0.0]])
    assert torch.equal(TernaryQuantizer.apply(x, 2, None, None, 2), expected)
    with pytest.raises(AssertionError, match="takes no range"):
        BinaryQuantizer.apply(x, 1, x.min(), x.max(), 1)


@pytest.mark.parametrize("quantizer", [SymQuantizer, AsymQuantizer])
def test_values_without_a_range_stay(quantizer):
    x = torch.zeros(2, 4, dtype=torch.float16)
    assert torch.equal(quantizer.apply(x, 4, None, None, 2), x)
    with pytest.raises(AssertionError, match="both ends"):
        quantizer.apply(x, 4, x.min(), None, 1)


def test_the_best_scores_are_kept_rounded_up_and_first_of_equals():
    scores = torch.tensor([0.0, 5.0, 5.0, -1.0, 5.0], requires_grad=True)
    mask = TopKBinarizer.apply(scores, 0.3, False)  # 1.5 of 5: two
    assert mask.tolist() == [0, 1, 1, 0, 0]
    (mask * torch.arange(5.0)).sum().backward()
    assert scores.grad.tolist() == [0, 1, 2, 3, 4]
    threshold = torch.tensor(0.0, requires_grad=True)  # its sigmoid is a half: 2.5 of 5
    mask = TopKBinarizer.apply(scores, threshold, True)
    (mask * torch.arange(5.0)).sum().backward()
    assert mask.tolist() == [0, 1, 1, 0, 1] and threshold.grad.item() == 7


def test_a_static_range_follows_the_batches_in_training_only():
    layer = QuantAct(quant_mode="asymmetric")
    layer(torch.tensor([-1.0, 3.0]), 8)
    layer(torch.tensor([-2.0, 1.0]), 8)
    expected = torch.tensor([-1 * 0.95 - 2 * 0.05, 3 * 0.95 + 1 * 0.05])
    torch.testing.assert_close(layer.x_min_max, expected)
    x = torch.tensor([-9.0, 0.5, 9.0])
    found = layer.eval()(x, 8)
    torch.testing.assert_close(layer.x_min_max, expected)
    scale = float(expected[1] - expected[0]) / 256
    assert (found[[0, 2]] - expected).abs().max() <= scale and abs(found[1] - 0.5) <= scale / 2
    fresh = QuantAct().eval()  # nothing learned: the batch's own range
    torch.testing.assert_close(fresh(x, 8)[1], torch.tensor(0.5), atol=9 / 256, rtol=0)


def stepped(quantizer, param, calls):
    """Bits after each call, the values put back."""
    bits, values = [], param.data.clone()
    for _ in range(calls):
        quantizer.quantize([[param]], False)
        bits.append(param.start_bits)
        param.data = values.clone()
    return bits


def marked():
    param = torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    param.start_bits, param.target_bits, param.q_period = 8, 5, 2
    return param


def test_bits_of_the_step_fall_each_time_the_steps_have_doubled():
    bits = stepped(Quantizer(), marked(), 10)
    assert bits == [8, 7, 7, 6, 6, 6, 6, 5, 5, 5]


def test_the_step_fades_from_values_to_rounded_ones_and_resumes_anywhere():
    quantizer, param = Quantizer(q_mixed_fp16=True, q_change_ratio=0.3), marked()
    before = param.data.clone()
    quantizer.quantize([[param]], False)
    rounded = SymQuantizer.apply(before, 8, None, None, 1)
    torch.testing.assert_close(param.data, 0.7 * before + 0.3 * rounded)
    quantizer.quantize([[param]], True)  # a skipped step
    assert quantizer.qsteps == 1
    for calls in (1, 3, 6, 12):
        one, other, first, second = *(Quantizer(0, True, 0.3) for _ in "ab"), marked(), marked()
        one.q_groups = 1
        stepped(one, first, calls)
        other.resume([second], calls)
        assert (second.start_bits, second.q_period) == (first.start_bits, first.q_period)
        assert other.qsteps == one.qsteps
        assert other.quantize_real_ratio == pytest.approx(one.quantize_real_ratio)


def test_stochastic_rounding_keeps_the_mean():
    torch.manual_seed(0)
    quantizer = Quantizer(q_rounding="stochastic")
    x = torch.full((100, 101), 0.3)
    x[0, 0] = 1.0  # levels of 2/8 at 3 bits
    found = quantizer.quantize_highbit(x, 3)
    assert set(found.unique().tolist()) <= {0.25, 0.5, 0.75}
    # the standard error of the mean of 10100 values that differ by 0.25 is 0.001
    assert abs(found.mean().item() - 0.3) < 0.005
    with pytest.raises(AssertionError, match="not nearest_neighbor"):
        quantizer.compute_quantization(x, 1)
