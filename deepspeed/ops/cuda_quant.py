# SPDX-License-Identifier: Apache-2.0
"""Group quantization to 8 and 4 bits, and what ZeRO++ makes of it: torch references, and kernels where there are some.

A group of values shares a scale 2^bits / (2 max|x|); asymmetric groups have a scale 2^bits / (max - min) and an offset.
Kept with the values, one row a group of fp32: 1 / scale, then the offset. Two 4-bit values lie in a byte, the first in
the low half. See csrc/cuda/quant_math.cuh, which says the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.ops import cuda
from deepspeed.ops.packing import NARROW_CODES
from deepspeed.utils.errors import explain

_GRID = 1 << 16  # blocks; further groups are taken in further rounds


class Scheme(NamedTuple):
    """How values are quantized: bits (8 or 4), with an offset or without."""

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
        int8 values (the last dimension halved for 4 bits), and fp32 [groups, 1 or 2].

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
    shape = list(quantized.shape)
    if scheme.bits == 4:
        shape[-1] *= 2
    numel = quantized.numel() * (8 // scheme.bits)
    launch = cuda.find("dequantize", quantized)
    if launch is None or dtype not in NARROW_CODES:
        return _values(quantized, params, groups, scheme).to(dtype).reshape(shape)
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
            seed = _seed() if stochastic else 0
            address = values.data_ptr()
            launch(min(groups, _GRID), address, code, groups, size, bits, asym, stochastic, seed)
        return values
    x = values.reshape(groups, -1).float()
    scale, offset = _grid(x, bits, asym)
    q = _round(x, scale, offset, bits, stochastic)
    values.copy_(((q - offset) * (1 / scale)).reshape(values.shape))
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
    each = 8 // scheme.bits
    numel = quantized.numel() * each // max(tensors, 1)
    if tensors < 1 or quantized.numel() % tensors or in_groups % tensors:
        raise ValueError(
            explain(
                "quantized tensors must be alike",
                got=f"{quantized.numel()} bytes in {in_groups} groups",
                expected=f"a multiple of {tensors} tensors",
            )
        )
    size = _split(numel, out_groups, each)
    launch = cuda.find("quantized_reduce", quantized)
    if launch is None:
        mean = _values(quantized, params, in_groups, scheme).reshape(tensors, -1).sum(0)
        mean = mean * (1 / tensors)
        return _quantize_reference(mean, out_groups, scheme, False, feedback, None)
    out = quantized.new_empty(numel // each)
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
    each = _values_a_byte(scheme)
    size = _group_size(values, groups, each)
    numbers = _feedback(feedback, values.numel())
    code = NARROW_CODES.get(values.dtype)
    name = "quantize" if swizzle is None else "swizzle_quantize"
    launch = cuda.find(name, values) if code is not None else None
    shape = list(values.shape) or [1]
    if each == 2 and shape[-1] % 2:
        shape = [values.numel()]  # groups are even, rows are not: there is no row to halve
    shape[-1] //= each
    if launch is None:
        q, params = _quantize_reference(values, groups, scheme, stochastic, feedback, swizzle)
        return q.reshape(shape), params
    values = values.contiguous()
    out = torch.empty(shape, dtype=torch.int8, device=values.device)
    params = torch.empty(groups, scheme.columns, dtype=torch.float32, device=values.device)
    last = (stochastic, _seed() if stochastic else 0) if swizzle is None else swizzle
    if values.numel():
        addresses = (values.data_ptr(), code, out.data_ptr(), params.data_ptr())
        sizes = (groups, size, scheme.bits, scheme.asym)
        launch(min(groups, _GRID), *addresses, *numbers, *sizes, *last)
    return out, params


def _quantize_reference(
    values: Tensor,
    groups: int,
    scheme: Scheme,
    stochastic: bool,
    feedback: Feedback | None,
    swizzle: Swizzle | None,
) -> tuple[Tensor, Tensor]:
    x = values.reshape(groups, -1).float()
    if feedback is not None:
        x = x + feedback.error.reshape(groups, -1).float()
    scale, offset = _grid(x, scheme.bits, scheme.asym)
    q = _round(x, scale, offset, scheme.bits, stochastic)
    if feedback is not None:
        lost = (x - (q - offset) * (1 / scale)).reshape(feedback.error.shape)
        new = feedback.beta * feedback.error.float() + (1 - feedback.beta) * lost
        feedback.error.copy_(new)
    params = torch.cat([1 / scale, offset], 1) if scheme.asym else 1 / scale
    if swizzle is not None:
        pipeline, nodes, devices = swizzle

        def order(t: Tensor) -> Tensor:
            apart = t.reshape(nodes, devices, pipeline, -1, t.shape[1])
            return apart.permute(2, 1, 0, 3, 4).reshape(t.shape)

        q, params = order(q), order(params)
    q = q.to(torch.int32).reshape(-1)
    if scheme.bits == 4:
        q = (q[0::2] & 15) | (q[1::2] & 15) << 4
    return q.to(torch.uint8).view(torch.int8), params


def _grid(x: Tensor, bits: int, asym: bool) -> tuple[Tensor, Tensor]:
    """Return scale and offset of each row."""
    levels = float(1 << bits)
    if asym:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        span = high - low
    else:
        low = torch.zeros((), device=x.device)
        span = 2 * x.abs().amax(1, keepdim=True)
    scale = torch.where(span == 0, torch.ones_like(span), levels / span)
    return scale, -levels / 2 - low * scale if asym else torch.zeros_like(scale)


def _round(x: Tensor, scale: Tensor, offset: Tensor, bits: int, stochastic: bool) -> Tensor:
    exact = x * scale + offset
    whole = (exact + torch.rand_like(exact)).floor() if stochastic else exact.round()
    half = 1 << (bits - 1)
    return whole.nan_to_num(nan=-half).clamp(-half, half - 1)


def _values(quantized: Tensor, params: Tensor, groups: int, scheme: Scheme) -> Tensor:
    """Return the fp32 values as [groups, group size]."""
    q = quantized.reshape(-1)
    if scheme.bits == 4:
        byte = q.to(torch.int32) & 255
        pairs = torch.stack([byte & 15, byte >> 4], 1).reshape(-1)
        q = torch.where(pairs >= 8, pairs - 16, pairs)
    q = q.reshape(groups, -1).float()
    kept = params.reshape(groups, scheme.columns).float()
    return (q - kept[:, 1:2]) * kept[:, :1] if scheme.asym else q * kept


def _values_a_byte(scheme: Scheme) -> int:
    if scheme.bits not in (4, 8):
        raise ValueError(
            explain("quantized values have a whole layout", got=scheme.bits, expected="8 or 4 bits")
        )
    return 8 // scheme.bits


def _group_size(values: Tensor, groups: int, each: int) -> int:
    if not values.is_floating_point():
        raise ValueError(
            explain("only floats are quantized", got=values.dtype, expected="fp32, bf16 or fp16")
        )
    return _split(values.numel(), groups, each)


def _split(numel: int, groups: int, each: int) -> int:
    if groups < 1 or numel % groups or numel // groups % each:
        raise ValueError(
            explain(
                "values do not divide into groups",
                got=f"{numel} values in {groups} groups",
                expected="equal groups" + (" of even size" if each == 2 else ""),
            )
        )
    return numel // groups


def _check_quantized(quantized: Tensor, params: Tensor, groups: int, scheme: Scheme) -> None:
    each = _values_a_byte(scheme)
    size = _split(quantized.numel() * each, groups, each)
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


def _seed() -> int:
    """Draw a seed from torch's generator, so that manual_seed fixes stochastic rounding too."""
    return int(torch.randint(1 << 62, (1,)).item())
