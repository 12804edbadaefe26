# SPDX-License-Identifier: Apache-2.0
"""What the builders of the CUDA ops load: the functions of the older compiled modules, over our ops, on any device."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from deepspeed.ops import cuda_fp_quant, cuda_quant, cuda_tokens
from deepspeed.ops.cuda_fp_quant import FloatFormat
from deepspeed.ops.cuda_quant import Feedback, Scheme, Swizzle
from deepspeed.utils.errors import explain


class QuantizationType(enum.IntEnum):
    """Whether groups have an offset."""

    Symmetric = 0
    Asymmetric = 1


def quantizer() -> SimpleNamespace:
    """Return the functions of the quantizer op; see `deepspeed.ops.cuda_quant`."""

    def quantize(
        vals: Tensor, groups: int, num_bits: int, quant_type: QuantizationType
    ) -> list[Tensor]:
        return list(cuda_quant.quantize(vals, groups, _scheme(num_bits, quant_type)))

    names = {
        f"ds_{'sr_' if stochastic else ''}quantize{'_asym' if asym else ''}_{dtype}": _fake(
            asym, stochastic
        )
        for dtype in ("fp32", "fp16")
        for asym in (False, True)
        for stochastic in (False, True)
    }
    return SimpleNamespace(
        QuantizationType=QuantizationType,
        Symmetric=QuantizationType.Symmetric,
        Asymmetric=QuantizationType.Asymmetric,
        quantize=quantize,
        dequantize=_dequantize(torch.float16),
        dequantize_fp32=_dequantize(torch.float32),
        dequantize_int8_to_half_experimental=_affine(8),
        dequantize_int4_to_half_experimental=_affine(4),
        swizzle_quant=_swizzle_quant,
        loco_swizzle_quant=_loco_swizzle_quant,
        quantized_reduction=_quantized_reduction,
        loco_quantized_reduction=_loco_quantized_reduction,
        **names,
    )


def fp_quantizer() -> SimpleNamespace:
    """Return quantize, dequantize, selective_dequantize and get_scales; see `deepspeed.ops.cuda_fp_quant`."""

    def quantize(
        out: Tensor,
        val: Tensor,
        group_size: int,
        stochastic_rounding: int,
        q_bits: int,
        q_mantisa_bits: int,
    ) -> Tensor:
        form = FloatFormat.of(q_bits, q_mantisa_bits)
        packed = cuda_fp_quant.fp_quantize(val, group_size, form, bool(stochastic_rounding))
        if out.numel() * out.element_size() != packed.numel():
            raise ValueError(
                explain(
                    "the output does not fit the packed values",
                    got=f"{out.numel() * out.element_size()} bytes",
                    expected=f"{packed.numel()} bytes",
                )
            )
        out.view(torch.uint8).reshape(-1).copy_(packed.reshape(-1))
        return out

    def unpack(
        val: Tensor, val_q: Tensor, form: FloatFormat, group_size: int, indexes: Tensor | None
    ) -> Tensor:
        rows = None
        if indexes is not None:
            rows = (indexes, val.numel() // max(indexes.numel(), 1) // group_size)
        packed = val_q.contiguous().view(torch.uint8)
        found = cuda_fp_quant.fp_dequantize(packed, group_size, form, val.dtype, rows)
        return val.copy_(found.reshape(val.shape))

    def dequantize(
        val: Tensor, val_q: Tensor, group_size: int, q_mantisa_bits: int, q_exponent_bits: int
    ) -> Tensor:
        form = FloatFormat.of(1 + q_mantisa_bits + q_exponent_bits, q_mantisa_bits)
        return unpack(val, val_q, form, group_size, None)

    def selective_dequantize(
        val: Tensor,
        val_q: Tensor,
        indexes: Tensor,
        group_size: int,
        q_mantisa_bits: int,
        q_exponent_bits: int,
    ) -> Tensor:
        form = FloatFormat.of(1 + q_mantisa_bits + q_exponent_bits, q_mantisa_bits)
        return unpack(val, val_q, form, group_size, indexes)

    def get_scales(out: Tensor, num_groups: int) -> Tensor:
        return cuda_fp_quant.scales(out.contiguous().view(torch.uint8), num_groups)

    return SimpleNamespace(
        quantize=quantize,
        dequantize=dequantize,
        selective_dequantize=selective_dequantize,
        get_scales=get_scales,
    )


def random_ltd() -> SimpleNamespace:
    """Return the functions that sort, gather and scatter kept tokens and cut masks to them."""

    def mask_gather_bert(mask: Tensor, indices: Tensor, truncated_len: int) -> Tensor:
        return cuda_tokens.mask_gather(mask, indices, truncated_len)

    def mask_gather_gpt(mask: Tensor, truncated_len: int) -> Tensor:
        return cuda_tokens.mask_gather(mask, None, truncated_len)

    return SimpleNamespace(
        token_sort_=cuda_tokens.token_sort_,
        token_gather=cuda_tokens.token_gather,
        token_scatter_=cuda_tokens.token_scatter_,
        mask_gather_bert=mask_gather_bert,
        mask_gather_gpt=mask_gather_gpt,
    )


def spatial_inference() -> SimpleNamespace:
    """Return the channels-last bias additions."""

    def nhwc_bias_add(activation: Tensor, bias: Tensor) -> Tensor:
        return cuda_tokens.bias_add(activation, bias)

    def nhwc_bias_add_add(activation: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        return cuda_tokens.bias_add(activation, bias, other)

    return SimpleNamespace(
        nhwc_bias_add=nhwc_bias_add,
        nhwc_bias_add_add=nhwc_bias_add_add,
        nhwc_bias_add_bias_add=cuda_tokens.bias_add,
    )


def _fake(asym: bool, stochastic: bool) -> Callable[[Tensor, int, int], Tensor]:
    def run(vals: Tensor, groups: int, bits: int) -> Tensor:
        with torch.no_grad():
            return cuda_quant.fake_quantize(vals.detach(), groups, bits, asym, stochastic)

    return run


def _affine(bits: int) -> Callable[..., Tensor]:
    """Return the dequantization of unsigned values by a scale and the least value of each group, in fp16."""

    def run(data: Tensor, scale: Tensor, least: Tensor, num_group: int, group_size: int) -> Tensor:
        values = data.contiguous().view(torch.uint8).reshape(-1)
        if bits == 4:
            values = torch.stack([values & 15, values >> 4], 1)
        grouped = values.reshape(num_group, group_size).float()
        column = (num_group, 1)
        return (grouped * scale.float().reshape(column) + least.float().reshape(column)).half()

    return run


def _scheme(bits: int, kind: int) -> Scheme:
    return Scheme(bits, kind == QuantizationType.Asymmetric)


def _dequantize(dtype: torch.dtype) -> Callable[..., Tensor]:
    def run(quantized: Tensor, params: Tensor, groups: int, bits: int, quant_type: int) -> Tensor:
        return cuda_quant.dequantize(quantized, params, groups, _scheme(bits, quant_type), dtype)

    return run


def _swizzle_quant(
    vals: Tensor, groups: int, bits: int, quant_type: int, *order: int
) -> list[Tensor]:
    # order: pipeline_size, nodes, devices_per_node
    scheme = _scheme(bits, quant_type)
    return list(cuda_quant.swizzle_quantize(vals, groups, scheme, Swizzle(*order)))


def _loco_swizzle_quant(
    vals: Tensor,
    error_feedback: Tensor,
    err_beta: float,
    groups: int,
    bits: int,
    quant_type: int,
    *order: int,
) -> list[Tensor]:
    scheme, kept = _scheme(bits, quant_type), Feedback(error_feedback, err_beta)
    return list(cuda_quant.swizzle_quantize(vals, groups, scheme, Swizzle(*order), kept))


def _quantized_reduction(
    vals: Tensor,
    scales: Tensor,
    in_groups: int,
    out_groups: int,
    bits: int,
    quant_type: int,
    devices_per_node: int,
) -> list[Tensor]:
    scheme, groups = _scheme(bits, quant_type), (in_groups, out_groups)
    return list(cuda_quant.quantized_reduction(vals, scales, groups, scheme, devices_per_node))


def _loco_quantized_reduction(
    vals: Tensor,
    error_feedback: Tensor,
    scales: Tensor,
    err_beta: float,
    in_groups: int,
    out_groups: int,
    bits: int,
    *kind: int,
) -> list[Tensor]:
    quant_type, devices = kind  # and devices_per_node
    scheme, groups = _scheme(bits, quant_type), (in_groups, out_groups)
    kept = Feedback(error_feedback, err_beta)
    return list(cuda_quant.quantized_reduction(vals, scales, groups, scheme, devices, kept))
