# SPDX-License-Identifier: Apache-2.0
"""Group quantization to small floats: fp8 (e4m3), fp6 (e3m2), fp12 (e4m7) and fp4 (e2m1), packed without gaps.

The formats have subnormals and neither infinities nor NaNs. A packed group is ``group_size * bits / 8`` bytes, four
values in each ``bits / 2`` of them from the low end, then its scale as four bytes of a float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.ops import cuda
from deepspeed.ops.cuda_quant import _GRID, _seed
from deepspeed.ops.packing import NARROW_CODES
from deepspeed.utils.errors import explain


class FloatFormat(NamedTuple):
    """A small float: bits of its exponent and of its mantissa."""

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        """Bits of a value, with the sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 2 - (1 << (self.exponent - 1))

    @property
    def most(self) -> float:
        """The greatest value."""
        top = (1 << self.exponent) - 2 + self.least_exponent
        return (2 - 2.0**-self.mantissa) * 2.0**top

    @staticmethod
    def of(bits: int, mantissa: int) -> FloatFormat:
        """Return the format of so many bits.

        Raises:
            ValueError: there is none.
        """
        found = FloatFormat(bits - 1 - mantissa, mantissa)
        if found not in FORMATS:
            raise ValueError(
                explain(
                    "no such small float",
                    got=f"{bits} bits with a mantissa of {mantissa}",
                    expected="8 with 3, 6 with 2, 12 with 7 or 4 with 1",
                )
            )
        return found


FORMATS = (FloatFormat(4, 3), FloatFormat(3, 2), FloatFormat(4, 7), FloatFormat(2, 1))


def packed_bytes(group_size: int, form: FloatFormat) -> int:
    """Return the bytes of a packed group, its scale included."""
    return group_size * form.bits // 8 + 4


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
    groups = _groups(values.numel(), group_size)
    code = NARROW_CODES.get(values.dtype)
    launch = cuda.find("fp_quantize", values) if code is not None else None
    if launch is None:
        return _pack(values.reshape(groups, group_size).float(), form, stochastic)
    values = values.contiguous()
    shape = (groups, packed_bytes(group_size, form))
    out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    if groups:
        addresses = (values.data_ptr(), code, out.data_ptr())
        seed = _seed() if stochastic else 0
        launch(min(groups, _GRID), *addresses, groups, group_size, *form, stochastic, seed)
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
    there = _groups(packed.numel() // bytes_each * group_size, group_size)
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
        every = packed.reshape(there, bytes_each)
        if rows is not None:
            every = every.reshape(-1, rows[1], bytes_each)[rows[0].long()].reshape(-1, bytes_each)
        return _unpack(every, group_size, form).to(dtype)
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


def _pack(x: Tensor, form: FloatFormat, stochastic: bool) -> Tensor:
    most = x.abs().amax(1, keepdim=True) if x.numel() else x.new_ones(x.shape[0], 1)
    scale = torch.where(most == 0, torch.ones_like(most), most / form.most)
    codes = _encode(x / scale, form, stochastic).reshape(-1, 4)
    shifts = torch.arange(4, device=x.device) * form.bits
    four = (codes << shifts).sum(1, keepdim=True)
    ends = torch.arange(form.bits // 2, device=x.device) * 8
    payload = (four >> ends & 255).to(torch.uint8).reshape(x.shape[0], -1)
    return torch.cat([payload, scale.contiguous().view(torch.uint8)], 1)


def _unpack(packed: Tensor, group_size: int, form: FloatFormat) -> Tensor:
    scale = packed[:, -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    units = packed[:, :-4].reshape(-1, form.bits // 2).long()
    four = (units << torch.arange(form.bits // 2, device=packed.device) * 8).sum(1, keepdim=True)
    codes = four >> torch.arange(4, device=packed.device) * form.bits & ((1 << form.bits) - 1)
    return _decode(codes, form).reshape(-1, group_size) * scale


def _encode(y: Tensor, form: FloatFormat, stochastic: bool) -> Tensor:
    """Return int64 codes; not finite becomes the greatest value."""
    size = y.abs().double().nan_to_num(nan=form.most, posinf=form.most)
    exponent = torch.frexp(size).exponent.long() - 1
    exponent = torch.where(size > 0, exponent, exponent.new_tensor(form.least_exponent))
    exponent = exponent.clamp_min(form.least_exponent)
    steps = torch.ldexp(size, form.mantissa - exponent)  # in units of the last place
    whole = (steps + torch.rand_like(steps)).floor() if stochastic else steps.round()
    code = ((exponent - form.least_exponent) << form.mantissa) + whole.long()
    code = code.clamp_max((1 << (form.exponent + form.mantissa)) - 1)
    return code | y.signbit().long() << (form.exponent + form.mantissa)


def _decode(code: Tensor, form: FloatFormat) -> Tensor:
    fraction = code & ((1 << form.mantissa) - 1)
    field = code >> form.mantissa & ((1 << form.exponent) - 1)
    whole = torch.where(field > 0, fraction | 1 << form.mantissa, fraction)
    power = (field - 1).clamp_min(0) + form.least_exponent - form.mantissa
    size = torch.ldexp(whole.float(), power)
    return torch.where(code >> (form.exponent + form.mantissa) & 1 > 0, -size, size)


def _groups(numel: int, group_size: int) -> int:
    if group_size < 4 or group_size % 4 or numel % group_size:
        raise ValueError(
            explain(
                "values do not divide into groups",
                got=f"{numel} values in groups of {group_size}",
                expected="whole groups of a multiple of 4",
            )
        )
    return numel // group_size


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
