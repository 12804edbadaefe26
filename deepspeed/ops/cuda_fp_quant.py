# SPDX-License-Identifier: Apache-2.0
"""Group quantization to small floats: fp8 (e4m3), fp6 (e3m2), fp12 (e4m7) and fp4 (e2m1), packed without gaps.

CUDA tensors go to the kernels, all others to the ops of `small_floats`, which tells the formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.ops import cuda, small_floats
from deepspeed.ops.cuda_quant import _GRID
from deepspeed.ops.packing import NARROW_CODES
from deepspeed.ops.random_bits import draw_seed, rounding
from deepspeed.ops.small_floats import FORMATS, FloatFormat, count_groups, packed_bytes
from deepspeed.utils.errors import explain

__all__ = ["FORMATS", "FloatFormat", "fp_dequantize", "fp_quantize", "packed_bytes", "scales"]


def fp_quantize(
    values: Tensor, group_size: int, form: FloatFormat, stochastic: bool = False
) -> Tensor:
    """Quantize groups of consecutive values; returns uint8 [groups, packed bytes].

    Args:
        values: fp32, bf16 or fp16.
        group_size: values a group, a multiple of 4 that divides their number.
        form: the small float.
        stochastic: round up with the probability of the fraction.

    Raises:
        ValueError: the sizes do not fit.
    """
    groups = count_groups(values.numel(), group_size)
    code = NARROW_CODES.get(values.dtype)
    launch = cuda.find("fp_quantize", values) if code is not None else None
    if launch is None:
        return small_floats.fp_quantize(values, group_size, *form, draw_seed(stochastic))
    values = values.contiguous()
    shape = (groups, packed_bytes(group_size, form))
    out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    if groups:
        addresses = (values.data_ptr(), code, out.data_ptr())
        chance = rounding(draw_seed(stochastic))
        launch(min(groups, _GRID), *addresses, groups, group_size, *form, *chance)
    return out


def fp_dequantize(
    packed: Tensor,
    group_size: int,
    form: FloatFormat,
    dtype: torch.dtype,
    rows: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Return the values of packed groups as [groups, group size].

    Args:
        packed: uint8, as many bytes as whole groups have.
        group_size: values a group.
        form: the small float.
        dtype: of the result: fp32, bf16 or fp16.
        rows: unpack only these rows: their int64 indexes, and the groups of each row.

    Raises:
        ValueError: the sizes do not fit.
        IndexError: a row is out of range (told only where the indexes are in the CPU's memory).
    """
    bytes_each = packed_bytes(group_size, form)
    there = count_groups(packed.numel() // bytes_each * group_size, group_size)
    if packed.dtype != torch.uint8 or packed.numel() % bytes_each:
        raise ValueError(
            explain(
                "packed small floats have whole groups",
                got=f"{packed.numel()} elements of {packed.dtype}",
                expected=f"a multiple of {bytes_each} bytes (uint8)",
            )
        )
    groups = there if rows is None else rows[0].numel() * rows[1]
    if rows is not None:
        _check_rows(rows[0], rows[1], there)
    launch = cuda.find("fp_dequantize", packed) if dtype in NARROW_CODES else None
    if launch is None:
        chosen = (None, 1) if rows is None else rows
        return small_floats.fp_dequantize(packed, group_size, *form, dtype, *chosen)
    out = torch.empty(groups, group_size, dtype=dtype, device=packed.device)
    packed = packed.contiguous()
    index = None if rows is None else rows[0].to(packed.device, torch.int64).contiguous()
    if groups:
        chosen = (0, 1) if index is None or rows is None else (index.data_ptr(), rows[1])
        sizes = (groups, group_size, *form)
        addresses = (packed.data_ptr(), out.data_ptr(), NARROW_CODES[dtype])
        launch(min(groups, _GRID), *addresses, *sizes, *chosen)
    return out


def scales(packed: Tensor, groups: int) -> Tensor:
    """Return the fp32 scale of each packed group, [groups, 1].

    Raises:
        ValueError: the bytes are not those of so many groups.
    """
    if groups < 1 or packed.numel() % groups:
        raise ValueError(
            explain("not whole groups", got=packed.numel(), expected=f"a multiple of {groups}")
        )
    return (
        packed.reshape(groups, -1)[:, -4:]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float32)
    )


def _check_rows(index: Tensor, row_groups: int, there: int) -> None:
    if row_groups < 1 or there % row_groups:
        raise ValueError(
            explain("not whole rows", got=f"{there} groups", expected=f"multiple of {row_groups}")
        )
    count = there // row_groups
    # on a device the check would wait for it
    if index.is_cpu and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise IndexError(
            explain("row out of range", got=index.tolist(), expected=f"0 to {count - 1}")
        )
