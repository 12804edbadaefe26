# SPDX-License-Identifier: Apache-2.0
"""FP_Quantize against an independent search of the nearest value of each small float."""

from __future__ import annotations

import pytest
import torch

from deepspeed.linear import QuantizationConfig
from deepspeed.ops.fp_quantizer import FP_Quantize, matmul_fp8

FORMATS = {8: (4, 3), 6: (3, 2), 12: (4, 7), 4: (2, 1)}


def every_value(bits):
    """All non-negative values of a format, from its definition (IEEE-like with subnormals, no infinity, no NaN)."""
    exponent_bits, mantissa_bits = FORMATS[bits]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                values.append(fraction * 2.0 ** (1 - bias))
            else:
                values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return torch.tensor(sorted(values), dtype=torch.float64)


def nearest(values, bits, group):
    grid = every_value(bits)
    x = values.double().reshape(-1, group)
    scale = x.abs().amax(1, keepdim=True).float().double() / grid[-1]
    scale = scale.float().double()
    size = (x.abs() / scale).unsqueeze(-1)
    found = grid[(size - grid).abs().argmin(-1)]
    return (found * x.sign() * scale).reshape(values.shape)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_value_becomes_its_nearest_neighbour(bits, dtype):
    torch.manual_seed(bits)
    x = torch.randn(6, 128).to(dtype)
    quantizer = FP_Quantize(QuantizationConfig(group_size=64))
    packed = quantizer.quantize(x, q_bits=bits)
    assert packed.dtype == torch.uint8 and packed.shape == (12, 64 * bits // 8 + 4)
    got = quantizer.dequantize(packed, q_bits=bits)
    assert got.dtype == dtype and got.shape == x.shape
    want = nearest(x, bits, 64)
    # Ties may go either way in the search, and results are rounded to fp32 and to the dtype.
    error, best = (got.double() - x.double()).abs(), (want - x.double()).abs()
    room = torch.finfo(dtype).eps * x.double().abs() + 1e-6
    assert (error <= best + room).all()


def test_scales_apart_and_joined_again():
    x = torch.randn(4, 64)
    quantizer = FP_Quantize(QuantizationConfig(group_size=64))
    values, scale = quantizer.quantize(x, return_meta_tensor=True)
    assert values.shape == x.shape and scale.shape == (4, 4)
    want = x.abs().amax(1, keepdim=True) / 480.0  # the greatest e4m3 value without infinities
    torch.testing.assert_close(quantizer.get_scales(), want)
    whole = quantizer.dequantize(quantizer.quantize(x))
    assert torch.equal(quantizer.dequantize(values, scale=scale), whole)


@pytest.mark.parametrize("group", [16, 64])
def test_rows_are_chosen(group):
    """Rows of 32 values: two groups in each, or half a group."""
    x = torch.randn(8, 32)
    quantizer = FP_Quantize(QuantizationConfig(group_size=group))
    packed = quantizer.quantize(x)
    index = torch.tensor([5, 0, 5])
    out = torch.empty(3, 32)
    got = quantizer.selective_dequantize(packed, index, fp_out=out)
    assert got is out and torch.equal(got, quantizer.dequantize(packed)[index])
    with pytest.raises(IndexError):
        quantizer.selective_dequantize(packed, torch.tensor([8]))


def test_sizes_that_do_not_fill_groups_come_back_as_they_were():
    x = torch.randn(3, 7)
    quantizer = FP_Quantize(QuantizationConfig(group_size=16))
    packed = quantizer.quantize(x, q_bits=12)
    assert packed.shape == (2, 28)
    assert (quantizer.dequantize(packed, q_bits=12) - x).abs().max() < 0.01 * x.abs().max()


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    x = torch.full((1, 65536), 0.3)
    x[0, 0] = 1.0
    quantizer = FP_Quantize(QuantizationConfig(group_size=65536))
    got = quantizer.dequantize(quantizer.quantize(x, q_bits=4, stochastic_mode=True), q_bits=4)
    # Neighbours of 0.3 on the scaled grid are 0.25 and 1/3: spread below 0.042, so the mean is within 5 sigma = 0.001.
    assert abs(got[0, 1:].mean().item() - 0.3) < 0.001
    assert len(got[0, 1:].unique()) == 2


@pytest.mark.parametrize("bits", [0, 3, 5, 7, 16])
def test_unknown_formats_are_refused(bits):
    with pytest.raises(ValueError, match="no such quantization"):
        FP_Quantize(QuantizationConfig(group_size=16)).quantize(torch.randn(16), q_bits=bits)


def test_misuse_is_told():
    quantizer = FP_Quantize(QuantizationConfig(group_size=16))
    with pytest.raises(RuntimeError, match="nothing has been quantized"):
        quantizer.dequantize(torch.zeros(1, 20, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="no scales"):
        quantizer.get_scales()
    with pytest.raises(ValueError, match="floating"):
        quantizer.quantize(torch.arange(16))


def test_a_product_with_a_weight_in_fp8_is_that_with_its_values():
    quantizer = FP_Quantize(QuantizationConfig(group_size=32))
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16, 64, dtype=torch.bfloat16)
    codes, _ = quantizer.quantize(weight, q_bits=8, return_meta_tensor=True)
    product = matmul_fp8(x, codes, quantizer.get_scales(), 32, quantizer)
    assert product.dtype == torch.bfloat16
    assert torch.equal(product, x @ quantizer.dequantize(codes, scale=quantizer.scale))
    with pytest.raises(ValueError, match="groups of 64"):
        matmul_fp8(x, codes, quantizer.get_scales(), 64, quantizer)
