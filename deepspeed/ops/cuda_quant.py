# SPDX-License-Identifier: Apache-2.0
"""Group quantization to 8, 6 and 4 bits, and what ZeRO++ makes of it: CUDA kernels, and the ops of `group_codes`.

A group of values shares a scale 2^bits / (2 max|x|); asymmetric groups have a scale 2^bits / (max - min) and an offset.
Kept with the values, one row a group of fp32: 1 / scale, then the offset. Two 4-bit values lie in a byte, the first in
the low half. See csrc/cuda/quant_math.cuh, which says the same; 6 bits (four values in three bytes) have no CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.ops import cuda, group_codes
from deepspeed.ops.group_codes import split, unit_of
from deepspeed.ops.packing import NARROW_CODES
from deepspeed.ops.random_bits import draw_seed, rounding
from deepspeed.utils.errors import explain

_GRID = 1 << 16  # blocks; further groups are taken in further rounds


class Scheme(NamedTuple):
    """How values are quantized: bits (8, 6 or 4), with an offset or without."""

    bits: int = 8
    asym: bool = False

    @property
    def columns(self) -> int:
        """Numbers kept a group."""
        return 2 if self.asym else 1


class Feedback(NamedTuple):
    """Error feedback: `error` (as large as the input) is added to it and then holds ``beta * error + (1 - beta) * lost``."""

    error: Tensor
    beta: float


class Swizzle(NamedTuple):
    """How groups are put in the order of a hierarchical all-to-all."""

    pipeline: int
    nodes: int
    devices: int


def quantize(
    values: Tensor,
    groups: int,
    scheme: Scheme,
    stochastic: bool = False,
    feedback: Feedback | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize equal groups of consecutive values.

    Args:
        values: fp32, bf16 or fp16, any shape; the elements divide evenly into the groups.
        groups: number of groups.
        scheme: bits and symmetry.
        stochastic: round up with the probability of the fraction, instead of to nearest even.
        feedback: error feedback, updated in place.

    Returns:
        int8 bytes (the last dimension halved for 4 bits, three quarters for 6), and fp32 [groups, 1 or 2].

    Raises:
        ValueError: the sizes do not fit.
    """
    return _quantize(values, groups, scheme, stochastic, feedback, None)


def swizzle_quantize(
    values: Tensor,
    groups: int,
    scheme: Scheme,
    swizzle: Swizzle,
    feedback: Feedback | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize groups that lie as [nodes, devices, pipeline, rest] into the order [pipeline, devices, nodes, rest].

    Raises:
        ValueError: the sizes do not fit.
    """
    parts = swizzle.pipeline * swizzle.nodes * swizzle.devices
    if parts <= 0 or groups % parts:
        raise ValueError(
            explain(
                "swizzled quantization needs whole groups for each peer",
                got=f"{groups} groups",
                expected=f"a multiple of pipeline * nodes * devices = {parts}",
            )
        )
    return _quantize(values, groups, scheme, False, feedback, swizzle)


def dequantize(
    quantized: Tensor, params: Tensor, groups: int, scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """Return the values that quantized groups stand for, in a dtype; the inverse of `quantize`.

    Raises:
        ValueError: the sizes do not fit.
    """
    _check_quantized(quantized, params, groups, scheme)
    shape = [*quantized.shape[:-1], quantized.shape[-1] * 8 // scheme.bits]
    numel = quantized.numel() * 8 // scheme.bits
    launch = _find("dequantize", quantized, scheme)
    if launch is None or dtype not in NARROW_CODES:
        return group_codes.dequantize_groups(quantized, params, groups, *scheme, dtype).view(shape)
    out = torch.empty(shape, dtype=dtype, device=quantized.device)
    quantized, params = quantized.contiguous(), params.contiguous()
    if numel:
        addresses = (quantized.data_ptr(), params.data_ptr(), out.data_ptr())
        each = numel // groups
        blocks = min(-(-numel // 256), _GRID)
        launch(blocks, *addresses, NARROW_CODES[dtype], numel, each, scheme.bits, scheme.asym)
    return out


def fake_quantize(
    values: Tensor, groups: int, bits: int, asym: bool = False, stochastic: bool = False
) -> Tensor:
    """Round values in place to what `bits` bits can hold, group by group; returns them.

    Raises:
        ValueError: the sizes do not fit, or the bits are not 1 to 16.
    """
    if not 1 <= bits <= 16:
        raise ValueError(explain("bits out of range", got=bits, expected="1 to 16"))
    size = _group_size(values, groups, 1)
    launch = cuda.find("fake_quantize", values)
    code = NARROW_CODES.get(values.dtype)
    if launch is not None and code is not None and values.is_contiguous():
        if values.numel():
            address = values.data_ptr()
            chance = rounding(draw_seed(stochastic))
            launch(min(groups, _GRID), address, code, groups, size, bits, asym, *chance)
        return values
    group_codes.fake_quantize(values, groups, bits, asym, draw_seed(stochastic))
    return values


def quantized_reduction(
    quantized: Tensor,
    params: Tensor,
    groups: tuple[int, int],
    scheme: Scheme,
    tensors: int,
    feedback: Feedback | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean of several quantized tensors, quantized again.

    Args:
        quantized: the tensors one after the other, int8.
        params: their groups' numbers, fp32.
        groups: groups in all of the input, and of the result.
        scheme: bits and symmetry of both.
        tensors: how many there are.
        feedback: error feedback on the mean, updated in place.

    Raises:
        ValueError: the sizes do not fit.
    """
    in_groups, out_groups = groups
    _check_quantized(quantized, params, in_groups, scheme)
    numel = quantized.numel() * 8 // scheme.bits // max(tensors, 1)
    if tensors < 1 or quantized.numel() % tensors or in_groups % tensors:
        raise ValueError(
            explain(
                "quantized tensors must be alike",
                got=f"{quantized.numel()} bytes in {in_groups} groups",
                expected=f"a multiple of {tensors} tensors",
            )
        )
    size = split(numel, out_groups, unit_of(scheme.bits))
    launch = _find("quantized_reduce", quantized, scheme)
    if launch is None:
        each = group_codes.dequantize_groups(quantized, params, in_groups, *scheme, torch.float32)
        mean = each.view(tensors, -1).sum(0).mul_(1 / tensors)
        return _quantize_plainly(mean, out_groups, scheme, False, feedback, None)
    out = quantized.new_empty(numel * scheme.bits // 8)
    out_params = params.new_empty(out_groups, scheme.columns)
    quantized, params = quantized.contiguous(), params.contiguous()
    if numel:
        launch(
            min(out_groups, _GRID),
            quantized.data_ptr(),
            params.data_ptr(),
            out.data_ptr(),
            out_params.data_ptr(),
            *_feedback(feedback, numel),
            tensors,
            tensors * numel // in_groups,
            out_groups,
            size,
            scheme.bits,
            scheme.asym,
            1 / tensors,
        )
    return out, out_params


def _quantize(
    values: Tensor,
    groups: int,
    scheme: Scheme,
    stochastic: bool,
    feedback: Feedback | None,
    swizzle: Swizzle | None,
) -> tuple[Tensor, Tensor]:
    unit = unit_of(scheme.bits)
    size = _group_size(values, groups, unit)
    numbers = _feedback(feedback, values.numel())
    code = NARROW_CODES.get(values.dtype)
    name = "quantize" if swizzle is None else "swizzle_quantize"
    launch = _find(name, values, scheme) if code is not None else None
    shape = list(values.shape) or [1]
    if shape[-1] % unit:
        shape = [values.numel()]  # groups fill whole bytes, rows do not: there is no row to cut
    shape[-1] = shape[-1] * scheme.bits // 8
    if launch is None:
        q, params = _quantize_plainly(values, groups, scheme, stochastic, feedback, swizzle)
        return q.reshape(shape), params
    values = values.contiguous()
    out = torch.empty(shape, dtype=torch.int8, device=values.device)
    params = torch.empty(groups, scheme.columns, dtype=torch.float32, device=values.device)
    last = rounding(draw_seed(stochastic)) if swizzle is None else swizzle
    if values.numel():
        addresses = (values.data_ptr(), code, out.data_ptr(), params.data_ptr())
        sizes = (groups, size, scheme.bits, scheme.asym)
        launch(min(groups, _GRID), *addresses, *numbers, *sizes, *last)
    return out, params


def _quantize_plainly(
    values: Tensor,
    groups: int,
    scheme: Scheme,
    stochastic: bool,
    feedback: Feedback | None,
    swizzle: Swizzle | None,
) -> tuple[Tensor, Tensor]:
    """Quantize by the ops; error feedback and order are put around them."""
    x = values
    if feedback is not None:
        x = values.float() + feedback.error.reshape(values.shape).float()
    seed = draw_seed(stochastic)
    q, params = group_codes.quantize_groups(x, groups, *scheme, seed)
    if feedback is not None:
        known = group_codes.dequantize_groups(q, params, groups, *scheme, torch.float32)
        lost = (x.reshape(-1) - known).reshape(feedback.error.shape)
        new = feedback.beta * feedback.error.float() + (1 - feedback.beta) * lost
        feedback.error.copy_(new)
    if swizzle is not None:
        pipeline, nodes, devices = swizzle

        def order(t: Tensor) -> Tensor:
            apart = t.reshape(nodes, devices, pipeline, -1, t.shape[1])
            return apart.permute(2, 1, 0, 3, 4).reshape(t.shape)

        q, params = order(q.reshape(groups, -1)).reshape(-1), order(params)
    return q, params


def _find(name: str, tensor: Tensor, scheme: Scheme) -> Callable[..., None] | None:
    return None if scheme.bits == 6 else cuda.find(name, tensor)


def _group_size(values: Tensor, groups: int, unit: int) -> int:
    if not values.is_floating_point():
        raise ValueError(
            explain("only floats are quantized", got=values.dtype, expected="fp32, bf16 or fp16")
        )
    return split(values.numel(), groups, unit)


def _check_quantized(quantized: Tensor, params: Tensor, groups: int, scheme: Scheme) -> None:
    size = split(quantized.numel() * 8 // scheme.bits, groups, unit_of(scheme.bits))
    wanted = groups * scheme.columns
    if quantized.dtype != torch.int8 or params.dtype != torch.float32 or params.numel() != wanted:
        raise ValueError(
            explain(
                f"groups of {size} values need int8 values and fp32 numbers",
                got=f"{quantized.dtype}, {params.numel()} numbers of {params.dtype}",
                expected=f"torch.int8, {wanted} numbers of torch.float32",
            )
        )
    if quantized.device != params.device:
        raise ValueError(explain("one device", got=params.device, expected=quantized.device))


def _feedback(feedback: Feedback | None, numel: int) -> tuple[int, int, float]:
    """Return the kernel's three arguments of error feedback."""
    if feedback is None:
        return 0, 0, 0.0
    error = feedback.error
    if error.numel() != numel or error.dtype not in NARROW_CODES or not error.is_contiguous():
        raise ValueError(
            explain(
                "the error feedback must match the values",
                got=f"{error.numel()} elements of {error.dtype}",
                expected=f"{numel} contiguous elements of fp32, bf16 or fp16",
            )
        )
    return error.data_ptr(), NARROW_CODES[error.dtype], feedback.beta
