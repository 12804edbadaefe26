# SPDX-License-Identifier: Apache-2.0
"""The quantization kernels, run on the CPU through the loader, against the torch references and plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops import cuda, cuda_fp_quant, cuda_quant
from deepspeed.ops.cuda_fp_quant import FORMATS, FloatFormat
from deepspeed.ops.cuda_quant import Feedback, Scheme, Swizzle

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCHEMES = [Scheme(bits, asym) for bits in (8, 4) for asym in (False, True)]
SIZES = ((1, 2), (3, 6), (2, 256), (5, 1030))


def by_reference(function, *args):
    """Call without kernels, whatever loader is in use."""
    before = cuda.use(cuda.Loader())
    try:
        return function(*args)
    finally:
        cuda.use(before)


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("groups", "size"), SIZES)
def test_quantize_and_back_agree_with_the_reference(kernels, dtype, scheme, groups, size):
    x = torch.randn(groups, size).to(dtype)
    q, params = cuda_quant.quantize(x, groups, scheme)
    expected = by_reference(cuda_quant.quantize, x, groups, scheme)
    assert torch.equal(q, expected[0]) and torch.equal(params, expected[1])
    back = cuda_quant.dequantize(q, params, groups, scheme, F32)
    assert torch.equal(back, by_reference(cuda_quant.dequantize, q, params, groups, scheme, F32))
    # half a step, a whole one for the largest value, which has no level of its own; plus fp32 rounding
    assert ((back - x.float()).abs() <= params[:, :1] * (1 + 1e-5) + 1e-6).all()
    assert len(kernels.calls("cuLaunchKernel")) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_constant_and_zero_groups_survive(kernels, scheme):
    x = torch.tensor([[0.0, 0, 0, 0], [3, 3, 3, 3], [-2, -2, -2, -2]])
    q, params = cuda_quant.quantize(x, 3, scheme)
    expected = by_reference(cuda_quant.quantize, x, 3, scheme)
    assert torch.equal(q, expected[0]) and torch.equal(params, expected[1])


def test_groups_beyond_the_grid_are_taken_in_further_rounds(kernels, monkeypatch):
    monkeypatch.setattr(cuda_quant, "_GRID", 2)
    x = torch.randn(7, 8)
    q, params = cuda_quant.quantize(x, 7, Scheme())
    expected = by_reference(cuda_quant.quantize, x, 7, Scheme())
    assert torch.equal(q, expected[0]) and torch.equal(params, expected[1])
    assert "grid 2,1,1" in kernels.calls("cuLaunchKernel")[0]
    assert torch.equal(
        cuda_quant.dequantize(q, params, 7, Scheme(), F16),
        by_reference(cuda_quant.dequantize, q, params, 7, Scheme(), F16),
    )


@pytest.mark.parametrize("bits", (1, 3, 8, 16))
@pytest.mark.parametrize("asym", (False, True))
def test_fake_quantization_agrees_with_the_reference(kernels, bits, asym):
    x = torch.randn(4, 300)
    wanted = by_reference(cuda_quant.fake_quantize, x.clone(), 4, bits, asym)
    got = cuda_quant.fake_quantize(x, 4, bits, asym)
    assert got is x and torch.equal(got, wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stochastic_rounding_is_unbiased_and_follows_the_seed(kernels, scheme):
    torch.manual_seed(3)
    x = torch.full((1, 40_000), 0.3)
    x[0, 0], x[0, 1] = 1.0, -1.0
    q, params = cuda_quant.quantize(x, 1, scheme, stochastic=True)
    back = cuda_quant.dequantize(q, params, 1, scheme, F32)[0, 2:]
    step = params[0, 0].item()
    assert back.unique().numel() == 2
    # the mean of 40,000 draws lies within five standard errors of at most half a step each
    assert abs(back.mean().item() - 0.3) < 5 * 0.5 * step / 200
    torch.manual_seed(3)
    again, _ = cuda_quant.quantize(x, 1, scheme, stochastic=True)
    other, _ = cuda_quant.quantize(x, 1, scheme, stochastic=True)
    assert torch.equal(again, q) and not torch.equal(other, q)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_swizzle_moves_groups_and_changes_no_value(kernels, scheme):
    swizzle, groups = Swizzle(pipeline=2, nodes=3, devices=4), 48
    x = torch.randn(groups, 10)
    q, params = cuda_quant.swizzle_quantize(x, groups, scheme, swizzle)
    plain, plain_params = cuda_quant.quantize(x, groups, scheme)
    order = torch.arange(groups).reshape(3, 4, 2, 2).permute(2, 1, 0, 3).reshape(-1)
    assert torch.equal(q, plain[order]) and torch.equal(params, plain_params[order])
    expected = by_reference(cuda_quant.swizzle_quantize, x, groups, scheme, swizzle)
    assert torch.equal(q, expected[0]) and torch.equal(params, expected[1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("in_groups", "out_groups"), ((12, 4), (12, 2), (3, 6)))
def test_the_reduction_is_the_mean_quantized_again(kernels, scheme, in_groups, out_groups):
    x = torch.randn(3, 240)
    q, params = cuda_quant.quantize(x, in_groups, scheme)
    args = (q.reshape(-1), params, (in_groups, out_groups), scheme, 3)
    got, got_params = cuda_quant.quantized_reduction(*args)
    wanted, wanted_params = by_reference(cuda_quant.quantized_reduction, *args)
    # three terms may be added in another order: the scale moves by an ulp, and a value at a tie by a step
    torch.testing.assert_close(got_params, wanted_params, rtol=1e-4, atol=1e-4)
    back = cuda_quant.dequantize(got, got_params, out_groups, scheme, F32)
    other = cuda_quant.dequantize(wanted, wanted_params, out_groups, scheme, F32)
    assert ((back - other).abs() <= 1.01 * got_params[:, 0].max()).all()
    assert ((back - other).abs() > 1e-4).float().mean() < 0.02
    mean = cuda_quant.dequantize(q, params, in_groups, scheme, F32).mean(0)
    assert ((back - mean).abs() <= 1.01 * got_params[:, 0].max()).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ("quantize", "swizzle", "reduce"))
def test_error_feedback_keeps_what_rounding_lost(kernels, scheme, kind):
    x, error = torch.randn(4, 64), torch.randn(4, 64) / 50
    errors = [error.clone(), error.clone()]

    def call(held):
        feedback = Feedback(held, 0.8)
        if kind == "quantize":
            return cuda_quant.quantize(x, 4, scheme, False, feedback)
        if kind == "swizzle":
            return cuda_quant.swizzle_quantize(x, 4, scheme, Swizzle(1, 2, 2), feedback)
        q, params = cuda_quant.quantize(x.repeat(2, 1), 8, scheme)
        return cuda_quant.quantized_reduction(q, params, (8, 4), scheme, 2, feedback)

    q, params = call(errors[0])
    wanted, wanted_params = by_reference(call, errors[1])
    assert torch.equal(q.reshape(-1), wanted.reshape(-1))
    torch.testing.assert_close(params, wanted_params, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(errors[0], error)


def test_sizes_that_do_not_fit_are_refused(kernels):
    x = torch.randn(10)
    for wrong in (
        lambda: cuda_quant.quantize(x, 3, Scheme()),
        lambda: cuda_quant.quantize(x, 0, Scheme()),
        lambda: cuda_quant.quantize(x, 2, Scheme(4)),
        lambda: cuda_quant.quantize(x, 2, Scheme(6)),
        lambda: cuda_quant.quantize(x.long(), 2, Scheme()),
        lambda: cuda_quant.quantize(x, 2, Scheme(), False, Feedback(torch.ones(3), 0.5)),
        lambda: cuda_quant.swizzle_quantize(x, 2, Scheme(), Swizzle(1, 2, 2)),
        lambda: cuda_quant.swizzle_quantize(x, 2, Scheme(), Swizzle(0, 2, 2)),
        lambda: cuda_quant.dequantize(x.to(torch.int8), torch.ones(3), 2, Scheme(), F32),
        lambda: cuda_quant.dequantize(x, torch.ones(2), 2, Scheme(), F32),
        lambda: cuda_quant.fake_quantize(x, 2, 17),
        lambda: cuda_fp_quant.fp_quantize(x, 4, FORMATS[0]),
        lambda: cuda_fp_quant.fp_quantize(x, 0, FORMATS[0]),
        lambda: cuda_fp_quant.fp_dequantize(torch.zeros(13, dtype=torch.uint8), 8, FORMATS[0], F32),
        lambda: FloatFormat.of(7, 3),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert kernels.calls("cuLaunchKernel") == []


def test_nothing_to_quantize_launches_nothing(kernels):
    q, params = cuda_quant.quantize(torch.empty(2, 0), 2, Scheme())
    assert q.numel() == 0 and params.shape == (2, 1)
    assert kernels.calls("cuLaunchKernel") == []


# ---------------------------------------------------------------- small floats


def values_of(form):
    """Every value of a format, by the definition: sign, exponent with a bias, mantissa, subnormals."""
    bias = 2 ** (form.exponent - 1) - 1
    found = {}
    for code in range(1 << form.bits):
        fraction = code % 2**form.mantissa / 2**form.mantissa
        field = code >> form.mantissa & (2**form.exponent - 1)
        size = (1 + fraction) * 2.0 ** (field - bias) if field else fraction * 2.0 ** (1 - bias)
        found[code] = -size if code >> (form.bits - 1) else size
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_every_code_decodes_to_its_value_and_the_middles_round_to_even(kernels, form):
    table = values_of(form)
    every = torch.tensor(sorted(set(table.values())), dtype=F32)
    assert every.max() == form.most
    middles = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    x = torch.cat([x, every[-1:].expand(-x.numel() % 4)])
    packed = cuda_fp_quant.fp_quantize(x, x.numel(), form)
    assert cuda_fp_quant.scales(packed, 1).item() == 1
    back = cuda_fp_quant.fp_dequantize(packed, x.numel(), form, F32)[0]
    codes = {value: code for code, value in table.items()}

    def nearest(value):
        best = min(abs(v - value) for v in table.values())
        tied = {v for v in table.values() if abs(v - value) == best}
        return min(tied, key=lambda v: codes[v] % 2)

    assert back.tolist() == [nearest(v) for v in x.tolist()]


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", (4, 128, 1028))
def test_small_floats_agree_with_the_reference_byte_for_byte(kernels, dtype, form, size):
    x = (torch.randn(6, size) * torch.tensor([[1e-3], [1], [30], [1e3], [0], [1e-20]])).to(dtype)
    packed = cuda_fp_quant.fp_quantize(x, size, form)
    assert packed.shape == (6, size * form.bits // 8 + 4)
    assert torch.equal(packed, by_reference(cuda_fp_quant.fp_quantize, x, size, form))
    back = cuda_fp_quant.fp_dequantize(packed, size, form, dtype)
    assert torch.equal(back, by_reference(cuda_fp_quant.fp_dequantize, packed, size, form, dtype))


def test_chosen_rows_are_unpacked_alone(kernels):
    form = FORMATS[0]
    x = torch.randn(6, 32)
    packed = cuda_fp_quant.fp_quantize(x, 16, form)
    every = cuda_fp_quant.fp_dequantize(packed, 16, form, F32).reshape(6, 32)
    rows = torch.tensor([4, 0, 4])
    got = cuda_fp_quant.fp_dequantize(packed, 16, form, F32, (rows, 2)).reshape(3, 32)
    assert torch.equal(got, every[rows])
    expected = by_reference(cuda_fp_quant.fp_dequantize, packed, 16, form, F32, (rows, 2))
    assert torch.equal(expected.reshape(3, 32), every[rows])
    with pytest.raises(IndexError):
        cuda_fp_quant.fp_dequantize(packed, 16, form, F32, (torch.tensor([6]), 2))


@pytest.mark.parametrize("form", FORMATS)
def test_stochastic_small_floats_are_unbiased(kernels, form):
    x = torch.full((1, 20_000), 0.313 * form.most)
    x[0, 0] = form.most
    packed = cuda_fp_quant.fp_quantize(x, x.numel(), form, stochastic=True)
    back = cuda_fp_quant.fp_dequantize(packed, x.numel(), form, F32)[0, 1:]
    low, high = back.unique().tolist()
    assert low < x[0, 1] < high
    # five standard errors of at most half the gap each
    assert abs(back.double().mean() - x[0, 1]) < 5 * 0.5 * (high - low) / 20_000**0.5


def test_what_is_not_finite_shows_in_its_group_and_no_other(kernels):
    form = FORMATS[0]
    x = torch.tensor([1.0, float("inf"), float("nan"), -1.0])
    back = cuda_fp_quant.fp_dequantize(cuda_fp_quant.fp_quantize(x, 4, form), 4, form, F32)
    assert not back.isfinite().all()  # the scale is not finite, so the damage shows
