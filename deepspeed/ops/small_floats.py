# SPDX-License-Identifier: Apache-2.0
"""Groups of consecutive values as small floats of 8, 6, 12 or 4 bits, as ops: references, and the CPU's kernels.

The formats have subnormals and neither infinities nor NaNs. A packed group is ``group_size * bits / 8`` bytes, four
values in each ``bits / 2`` of them from the low end, then its scale as four bytes of a float32. A seed makes rounding
stochastic (`random_bits`), -1 nearest. `cuda_fp_quant` is the door that callers use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.ops import random_bits
from deepspeed.ops.abi import FORMATS as ABI_FORMATS
from deepspeed.ops.packing import NARROW_CODES, check_bytes, check_real, is_plain, threads
from deepspeed.ops.registry import Op, Ulp
from deepspeed.utils.errors import explain

_QUANTIZE = ABI_FORMATS["ds_fp_quantize_args"]
_DEQUANTIZE = ABI_FORMATS["ds_fp_dequantize_args"]


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


def count_groups(numel: int, group_size: int) -> int:
    """Return how many groups the values make.

    Raises:
        ValueError: they do not divide into groups of a multiple of 4 values.
    """
    if group_size < 4 or group_size % 4 or numel % group_size:
        raise ValueError(
            explain(
                "values do not divide into groups",
                got=f"{numel} values in groups of {group_size}",
                expected="whole groups of a multiple of 4",
            )
        )
    return numel // group_size


def _known(exponent: int, mantissa: int) -> FloatFormat:
    form = FloatFormat(exponent, mantissa)
    if form not in FORMATS:
        known = ", ".join(f"{f.exponent} and {f.mantissa}" for f in FORMATS)
        raise ValueError(
            explain(
                "there is no small float of these bits",
                got=f"{exponent} of exponent and {mantissa} of mantissa",
                expected=known,
            )
        )
    return form


def _packed_groups(packed: Tensor, group_size: int, exponent: int, mantissa: int) -> int:
    """Return how many packed groups these bytes are."""
    check_bytes("fp_dequantize", packed)
    count_groups(0, group_size)
    each = packed_bytes(group_size, _known(exponent, mantissa))
    if packed.numel() % each:
        raise ValueError(
            explain(
                "packed bytes are no whole groups",
                got=f"{packed.numel()} bytes",
                expected=f"a multiple of {each} for groups of {group_size}",
            )
        )
    return packed.numel() // each


def _quantize_reference(
    x: Tensor, group_size: int, exponent: int, mantissa: int, seed: int
) -> Tensor:
    check_real("fp_quantize", x)
    form = _known(exponent, mantissa)
    rows = x.reshape(count_groups(x.numel(), group_size), group_size).float()
    most = rows.abs().amax(1, keepdim=True) if rows.numel() else rows.new_ones(rows.shape[0], 1)
    scale = torch.where(most == 0, torch.ones_like(most), most / form.most)
    codes = _encode(rows / scale, form, seed).reshape(-1, 4)
    shifts = torch.arange(4, device=x.device) * form.bits
    four = (codes << shifts).sum(1, keepdim=True)
    ends = torch.arange(form.bits // 2, device=x.device) * 8
    payload = (four >> ends & 255).to(torch.uint8).reshape(rows.shape[0], -1)
    return torch.cat([payload, scale.contiguous().view(torch.uint8)], 1)


def _encode(y: Tensor, form: FloatFormat, seed: int) -> Tensor:
    """Return int64 codes; not finite becomes the greatest value."""
    size = y.abs().double().nan_to_num(nan=form.most, posinf=form.most)
    exponent = torch.frexp(size).exponent.long() - 1
    exponent = torch.where(size > 0, exponent, exponent.new_tensor(form.least_exponent))
    exponent = exponent.clamp_min(form.least_exponent)
    steps = torch.ldexp(size, form.mantissa - exponent)  # in units of the last place
    whole = steps.round() if seed == random_bits.NEAREST else _round_by_chance(size, form, seed)
    code = ((exponent - form.least_exponent) << form.mantissa) + whole.long()
    code = code.clamp_max((1 << (form.exponent + form.mantissa)) - 1)
    return code | y.signbit().long() << (form.exponent + form.mantissa)


def _round_by_chance(size: Tensor, form: FloatFormat, seed: int) -> Tensor:
    """Add as many random bits below the unit as the fp32 value has there, at most 31."""
    _, random = random_bits.noise(seed, size.numel(), size.device)
    own = torch.frexp(size).exponent.long() - 1
    cut = (23 - form.mantissa + (form.least_exponent - own).clamp_min(0)).clamp_max(31)
    mantissa = torch.ldexp(size, 23 - own)  # a whole number of 24 bits
    mantissa = torch.where(size < 2.0**-126, 0.0, mantissa)  # subnormals of fp32 count as nothing
    added = random.reshape(size.shape) & ((1 << cut) - 1)
    return torch.ldexp(mantissa + added, -cut).floor()


def _decode(code: Tensor, form: FloatFormat) -> Tensor:
    fraction = code & ((1 << form.mantissa) - 1)
    field = code >> form.mantissa & ((1 << form.exponent) - 1)
    whole = torch.where(field > 0, fraction | 1 << form.mantissa, fraction)
    power = (field - 1).clamp_min(0) + form.least_exponent - form.mantissa
    size = torch.ldexp(whole.float(), power)
    return torch.where(code >> (form.exponent + form.mantissa) & 1 > 0, -size, size)


def _quantize_fake(x: Tensor, group_size: int, exponent: int, mantissa: int, seed: int) -> Tensor:
    form = FloatFormat(exponent, mantissa)
    shape = (x.numel() // group_size, packed_bytes(group_size, form))
    return x.new_empty(shape, dtype=torch.uint8)


def _quantize_pack(
    x: Tensor, group_size: int, exponent: int, mantissa: int, seed: int
) -> tuple[bytes, Tensor] | None:
    check_real("fp_quantize", x)
    form = _known(exponent, mantissa)
    groups = count_groups(x.numel(), group_size)
    if x.dtype not in NARROW_CODES or not is_plain(x):
        return None
    out = torch.empty((groups, packed_bytes(group_size, form)), dtype=torch.uint8, device="cpu")
    addresses = (x.data_ptr(), out.data_ptr())
    kind = (NARROW_CODES[x.dtype], exponent, mantissa)
    rounding = random_bits.rounding(seed)
    sizes = (groups, group_size)
    return _QUANTIZE.pack(_QUANTIZE.size, threads(), *sizes, *addresses, *kind, *rounding), out


def _dequantize_reference(
    packed: Tensor,
    group_size: int,
    exponent: int,
    mantissa: int,
    dtype: torch.dtype,
    rows: Tensor | None,
    row_groups: int,
) -> Tensor:
    form = FloatFormat(exponent, mantissa)
    _packed_groups(packed, group_size, exponent, mantissa)
    every = packed.reshape(-1, packed_bytes(group_size, form))
    if rows is not None:
        apart = every.reshape(-1, row_groups, every.shape[1])
        every = apart[rows.long()].reshape(-1, every.shape[1])
    scale = every[:, -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    units = every[:, :-4].reshape(-1, form.bits // 2).long()
    four = (units << torch.arange(form.bits // 2, device=packed.device) * 8).sum(1, keepdim=True)
    codes = four >> torch.arange(4, device=packed.device) * form.bits & ((1 << form.bits) - 1)
    return (_decode(codes, form).reshape(-1, group_size) * scale).to(dtype)


def _dequantize_fake(
    packed: Tensor,
    group_size: int,
    exponent: int,
    mantissa: int,
    dtype: torch.dtype,
    rows: Tensor | None,
    row_groups: int,
) -> Tensor:
    there = packed.numel() // packed_bytes(group_size, FloatFormat(exponent, mantissa))
    groups = there if rows is None else rows.numel() * row_groups
    return packed.new_empty((groups, group_size), dtype=dtype)


def _dequantize_pack(
    packed: Tensor,
    group_size: int,
    exponent: int,
    mantissa: int,
    dtype: torch.dtype,
    rows: Tensor | None,
    row_groups: int,
) -> tuple[bytes, Tensor, Tensor | None] | None:
    there = _packed_groups(packed, group_size, exponent, mantissa)
    if dtype not in NARROW_CODES or not is_plain(packed):
        return None
    index = None if rows is None else rows.to(torch.int64).contiguous()
    groups = there if index is None else index.numel() * row_groups
    out = torch.empty((groups, group_size), dtype=dtype, device="cpu")
    chosen = (0, 1) if index is None else (index.data_ptr(), row_groups)
    kind = (NARROW_CODES[dtype], exponent, mantissa, 0)
    addresses = (packed.data_ptr(), out.data_ptr())
    sizes = (groups, group_size)
    head = (_DEQUANTIZE.size, threads())
    return _DEQUANTIZE.pack(*head, *sizes, *addresses, *chosen, there, *kind), out, index


fp_quantize = Op(
    "fp_quantize(Tensor x, int group_size, int exponent, int mantissa, int seed) -> Tensor",
    reference=_quantize_reference,
    fake=_quantize_fake,
    cpu="ds_fp_quantize",
    pack=_quantize_pack,
    tolerance=Ulp(0),
)

fp_dequantize = Op(
    "fp_dequantize(Tensor packed, int group_size, int exponent, int mantissa, ScalarType dtype, "
    "Tensor? rows, int row_groups) -> Tensor",
    reference=_dequantize_reference,
    fake=_dequantize_fake,
    cpu="ds_fp_dequantize",
    pack=_dequantize_pack,
    tolerance=Ulp(0),
)
