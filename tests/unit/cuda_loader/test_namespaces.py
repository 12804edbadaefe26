# SPDX-License-Identifier: Apache-2.0
"""The older function names, by kernel and by torch: what the builders load does what its name says."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops import cuda
from deepspeed.ops.op_builder.all_ops import ALL_OPS


@pytest.fixture(params=("kernel", "reference"))
def way(request, kernels):
    before = cuda.use(cuda.Loader()) if request.param == "reference" else None
    yield request.param
    if before is not None:
        cuda.use(before)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("kind", ("Symmetric", "Asymmetric"))
def test_the_quantizer_goes_there_and_back(way, bits, kind):
    op = ALL_OPS["quantizer"].load()
    kind = getattr(op, kind)
    x = torch.randn(8, 64)
    q, params = op.quantize(x, 8, bits, kind)
    assert q.shape == (8, 64 * bits // 8) and params.shape == (8, 1 + int(kind))
    step = params[:, :1] * 1.01
    back = op.dequantize_fp32(q, params, 8, bits, kind)
    assert ((back - x).abs() <= step).all()
    assert torch.equal(op.dequantize(q, params, 8, bits, kind), back.half())
    swizzled, _ = op.swizzle_quant(x, 8, bits, kind, 1, 2, 2)
    assert torch.equal(swizzled[2:4], q[4:6]) and torch.equal(swizzled[4:6], q[2:4])
    mean, scales = op.quantized_reduction(q, params, 8, 4, bits, kind, 2)
    wanted = back.reshape(2, -1).mean(0).reshape(4, 64)
    got = op.dequantize_fp32(mean.reshape(4, -1), scales, 4, bits, kind)
    assert ((got - wanted).abs() <= scales[:, :1] * 1.01).all()
    error = torch.zeros(8, 64)
    again, _ = op.loco_swizzle_quant(x, error, 0.5, 8, bits, kind, 1, 2, 2)
    assert torch.equal(again, swizzled)
    torch.testing.assert_close(error, 0.5 * (x - back), rtol=1e-4, atol=1e-5)
    error = torch.zeros(256)
    op.loco_quantized_reduction(q, error, params, 0.5, 8, 4, bits, kind, 2)
    assert error.any()


@pytest.mark.parametrize("name", ("ds_quantize_fp32", "ds_sr_quantize_asym_fp16"))
def test_fake_quantization_works_in_place(way, name):
    op = ALL_OPS["quantizer"].load()
    x = torch.randn(4, 32, dtype=torch.float16 if "16" in name else torch.float32)
    before = x.clone()
    got = getattr(op, name)(x, 4, 8)
    assert got.data_ptr() == x.data_ptr() and not torch.equal(x, before)
    spread = before.float().amax(1, keepdim=True) - before.float().amin(1, keepdim=True)
    assert ((x - before).abs() <= 2 * spread / 128).all()


def test_small_floats_go_there_and_back(way):
    op = ALL_OPS["fp_quantizer"].load()
    x = torch.randn(4, 128).bfloat16()
    for bits, mantissa in ((8, 3), (6, 2), (12, 7), (4, 1)):
        out = torch.empty(8, 64 * bits // 8 + 4, dtype=torch.uint8)
        assert op.quantize(out, x, 64, 0, bits, mantissa) is out
        back = op.dequantize(torch.empty_like(x), out, 64, mantissa, bits - 1 - mantissa)
        # the largest relative error of a rounding, and of subnormals in parts of the group's greatest value
        assert ((back - x).abs() <= x.abs() * 2.0**-mantissa + x.abs().max() / 8).all()
        scales = op.get_scales(out, 8)
        assert scales.shape == (8, 1) and (scales > 0).all()
        rows = torch.tensor([2, 0])
        part = torch.empty(2, 128, dtype=x.dtype)
        op.selective_dequantize(part, out, rows, 64, mantissa, bits - 1 - mantissa)
        assert torch.equal(part, back[rows])
    with pytest.raises(ValueError, match="does not fit the packed values"):
        op.quantize(torch.empty(3, dtype=torch.uint8), x, 64, 0, 8, 3)


def test_tokens_and_biases_have_their_older_names(way):
    op = ALL_OPS["random_ltd"].load()
    index = torch.tensor([[[3, 1]]], dtype=torch.int32)
    op.token_sort_(index, 4)
    assert index.tolist() == [[[1, 3]]]
    mask = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert op.mask_gather_bert(mask, index, 2)[0, 0, 0].tolist() == [[5, 7], [13, 15]]
    assert op.mask_gather_gpt(mask, 2)[0, 0].tolist() == [[0, 1], [4, 5]]
    op = ALL_OPS["spatial_inference"].load()
    x = torch.ones(1, 4, 2, 2).half().contiguous(memory_format=torch.channels_last)
    bias = torch.arange(4).half()
    assert op.nhwc_bias_add_bias_add(x, bias, x, bias)[0, :, 0, 0].tolist() == [2, 4, 6, 8]
    assert op.nhwc_bias_add_add(x, bias, x)[0, :, 0, 0].tolist() == [2, 3, 4, 5]
    assert op.nhwc_bias_add(x, bias)[0, :, 0, 0].tolist() == [1, 2, 3, 4]


def test_the_fused_modules_obey_the_noop_flag(way):
    adam, lion = ALL_OPS["fused_adam"].load(), ALL_OPS["fused_lion"].load()
    g, p, m, v = ([torch.ones(9)] for _ in range(4))
    for flag, moved in ((1, False), (0, True)):
        noop = torch.tensor([flag], dtype=torch.int32)
        before = p[0].clone()
        adam.multi_tensor_adam(65536, noop, [g, p, m, v], 0.1, 0.9, 0.99, 1e-8, 1, 1, 1, 0.0)
        lion.multi_tensor_lion(65536, noop, [g, p, m], 0.1, 0.9, 0.99, 1, 0.0)
        assert torch.equal(p[0], before) != moved
