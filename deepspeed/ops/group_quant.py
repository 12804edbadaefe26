# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 or 4 bits: groups of values along one dimension share a scale and a minimum.

A group's codes are ``round((x - min) * scale)`` with ``scale = (2^bits - 1) / (max - min)``; symmetric ones are
``round(x * scale) + half`` with ``scale = half / max|x|`` and half = 7 or 127, so that zero stays zero. Scales and
minima have the dtype of the values; codes are found with the scale as it is stored, so that its rounding adds no error.
Two 4-bit codes lie in a byte, the first in the high half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops.abi import FORMATS
from deepspeed.ops.packing import NARROW_CODES, check_bytes, check_real, is_plain, threads
from deepspeed.ops.registry import Op, Ulp
from deepspeed.utils.errors import DeepSpeedConfigError, explain

_QUANTIZE = FORMATS["ds_quantize_args"]
_DEQUANTIZE = FORMATS["ds_dequantize_args"]

# Values that the CPU treats at once: what it makes on the way stays in its caches.
_CPU_CHUNK = 128 * 1024

_KEYS = ("num_bits", "group_size", "group_dim", "symmetric")


@dataclass(frozen=True)
class GroupScheme:
    """How a weight is quantized.

    Attributes:
        bits: 4 or 8.
        size: values of a group.
        dim: dimension along which groups lie.
        symmetric: around zero, without a minimum.
    """

    bits: int
    size: int
    dim: int = 1
    symmetric: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> GroupScheme:
        """Read num_bits, group_size, group_dim (default 1) and symmetric (default False).

        Raises:
            DeepSpeedConfigError: a key is unknown or missing, or a value cannot be.
        """
        unknown = sorted(set(settings) - set(_KEYS))
        missing = [key for key in _KEYS[:2] if key not in settings]
        if unknown or missing:
            raise DeepSpeedConfigError(
                explain(
                    "the settings of weight quantization are not understood",
                    got=f"unknown {unknown}, missing {missing}",
                    expected=f"{', '.join(_KEYS)}; the first two are needed",
                )
            )
        scheme = cls(
            settings["num_bits"],
            settings["group_size"],
            settings.get("group_dim", 1),
            settings.get("symmetric", False),
        )
        for key, value, fits, expected in (
            ("num_bits", scheme.bits, scheme.bits in (4, 8), "4 or 8"),
            ("group_size", scheme.size, _is_count(scheme.size, 1), "a positive integer"),
            ("group_dim", scheme.dim, _is_count(scheme.dim, 0), "an integer from 0 on"),
            ("symmetric", scheme.symmetric, isinstance(scheme.symmetric, bool), "true or false"),
        ):
            if not fits:
                raise DeepSpeedConfigError(
                    explain(
                        f"weight quantization cannot use this {key}", got=value, expected=expected
                    )
                )
        return scheme

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 * self.half if self.symmetric else 2**self.bits - 1

    @property
    def half(self) -> int:
        """The code of zero, if symmetric."""
        return 2 ** (self.bits - 1) - 1

    def check(self, shape: torch.Size) -> None:
        """Refuse a shape that does not divide into groups, or whose codes do not fill bytes.

        Raises:
            ValueError: naming the sizes.
        """
        if self.bits not in (4, 8):
            raise ValueError(
                explain("weights have no such codes", got=f"{self.bits} bits", expected="8 or 4")
            )
        lies = 0 <= self.dim < len(shape) and self.size > 0 and 0 not in shape
        if not lies or shape[self.dim] % self.size:
            raise ValueError(
                explain(
                    "a weight does not divide into quantization groups",
                    got=f"shape {tuple(shape)}, group_size {self.size} along group_dim {self.dim}",
                    expected="a dimension that is a multiple of group_size",
                    fix="choose a group_size that divides it, or the other group_dim",
                )
            )
        if self.bits == 4 and shape[-1] % 2:
            raise ValueError(
                explain(
                    "4-bit values are stored in pairs along the last dimension",
                    got=f"shape {tuple(shape)}",
                    expected="an even last dimension",
                    fix="use num_bits 8",
                )
            )

    @classmethod
    def of_codes(
        cls, codes: Tensor, scale: Tensor, least: Tensor, numbers: tuple[int, int, int, bool]
    ) -> GroupScheme:
        """The scheme of codes and of what belongs to them.

        Raises:
            ValueError: the sizes do not fit, or the codes are no bytes.
        """
        check_bytes("dequantize_weight", codes)
        scheme = cls(*numbers)
        shape = torch.Size([*codes.shape[:-1], codes.shape[-1] * 8 // max(scheme.bits, 1)])
        scheme.check(shape)
        groups = math.prod(shape) // scheme.size
        sides = (scale,) if scheme.symmetric else (scale, least)
        if any(side.numel() != groups for side in sides):
            raise ValueError(
                explain(
                    "each group of a weight has its scale, and its minimum unless it is symmetric",
                    got=f"{[side.numel() for side in sides]} numbers",
                    expected=f"{groups} each",
                )
            )
        return scheme

    @property
    def numbers(self) -> tuple[int, int, int, bool]:
        """The arguments of the ops."""
        return self.bits, self.size, self.dim, self.symmetric

    def code_shape(self, shape: torch.Size) -> list[int]:
        """The shape of the codes, in bytes."""
        return [*shape[:-1], shape[-1] * self.bits // 8]

    def scale_shape(self, shape: torch.Size) -> list[int]:
        """The shape of scales and minima: groups take the place of their dimension, followed by a 1."""
        return [*shape[: self.dim], shape[self.dim] // self.size, 1, *shape[self.dim + 1 :]]

    def grouped(self, values: Tensor) -> Tensor:
        """A view in which groups have a dimension of their own, before that of their values."""
        shape = values.shape
        groups = shape[self.dim] // self.size
        return values.view(*shape[: self.dim], groups, self.size, *shape[self.dim + 1 :])


def quantize(values: Tensor, scheme: GroupScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight.

    Args:
        values: fp32, bf16 or fp16, two dimensions or more.
        scheme: bits and groups.

    Returns:
        uint8 codes (the last dimension halved for 4 bits), then scales and minima in the values' dtype with the shape
        `scheme.scale_shape`; symmetric schemes have an empty tensor for the minima.

    Raises:
        ValueError: the shape does not fit.
    """
    scheme.check(values.shape)
    return quantize_weight(values.detach().contiguous(), *scheme.numbers)


def _quantize_reference(
    values: Tensor, bits: int, size: int, dim: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scheme = GroupScheme(bits, size, dim, symmetric)
    check_real("quantize_weight", values)
    scheme.check(values.shape)
    codes = values.new_empty(scheme.code_shape(values.shape), dtype=torch.uint8)
    scale = values.new_empty(scheme.scale_shape(values.shape))
    least = values.new_empty(0 if scheme.symmetric else scale.shape)
    for rows, groups in _chunks(values, scheme):
        grouped = scheme.grouped(values[rows]).to(torch.float32, copy=True)
        high = grouped.amax(scheme.dim + 1, keepdim=True)
        low = grouped.amin(scheme.dim + 1, keepdim=True)
        levels, span = (
            (scheme.half, torch.maximum(high, -low))
            if scheme.symmetric
            else (scheme.top, high - low)
        )
        # A constant group has no span: the largest number stands for an infinite scale, and its codes are zero.
        scale[groups] = (levels / span).clamp_(max=torch.finfo(values.dtype).max)
        stored = scale[groups].float()
        if scheme.symmetric:
            grouped = grouped.mul_(stored).round_().add_(scheme.half)
        else:
            least[groups] = low
            grouped = grouped.sub_(low).mul_(stored).round_()
        whole = grouped.nan_to_num_(nan=0).clamp_(0, scheme.top)
        _pack(whole.view_as(values[rows]), scheme.bits, codes[rows])
    return codes, scale, least


def dequantize(
    codes: Tensor, scale: Tensor, least: Tensor, scheme: GroupScheme, dtype: torch.dtype
) -> Tensor:
    """The weight that codes stand for.

    Args:
        codes, scale, least: as `quantize` gave them.
        scheme: the same scheme.
        dtype: of the result.
    """
    return dequantize_weight(codes, scale, least, *scheme.numbers, dtype)


def _dequantize_reference(
    codes: Tensor,
    scale: Tensor,
    least: Tensor,
    bits: int,
    size: int,
    dim: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    scheme = GroupScheme.of_codes(codes, scale, least, (bits, size, dim, symmetric))
    values = codes.new_empty([*codes.shape[:-1], codes.shape[-1] * 8 // scheme.bits], dtype=dtype)
    for rows, groups in _chunks(values, scheme):
        part = values[rows]
        _unpack(codes[rows], scheme.bits, part)
        grouped = scheme.grouped(part)
        if scheme.symmetric:
            grouped.sub_(scheme.half).div_(scale[groups])
        else:
            # Codes are exact in every dtype, and this rounds once.
            torch.addcdiv(least[groups], grouped, scale[groups], out=grouped)
    return values


def _chunks(values: Tensor, scheme: GroupScheme) -> Iterator[tuple[slice, slice]]:
    """Slices of the first dimension: of values and codes, and of scales and minima."""
    unit = scheme.size if scheme.dim == 0 else 1
    rows = values.shape[0]
    step = rows
    if values.device.type == "cpu":
        step = max(1, _CPU_CHUNK // (values.numel() // rows * unit)) * unit
    for at in range(0, rows, step):
        end = min(at + step, rows)
        yield slice(at, end), slice(at // unit, end // unit)


def _pack(whole: Tensor, bits: int, out: Tensor) -> None:
    codes = whole.to(torch.uint8)
    if bits == 8:
        out.copy_(codes)
    else:
        torch.bitwise_or(codes[..., 0::2] << 4, codes[..., 1::2], out=out)


def _unpack(codes: Tensor, bits: int, out: Tensor) -> None:
    if bits == 8:
        out.copy_(codes)
    else:
        out[..., 0::2] = codes >> 4
        out[..., 1::2] = codes & 15


def _quantize_fake(
    values: Tensor, bits: int, size: int, dim: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scheme = GroupScheme(bits, size, dim, symmetric)
    codes = values.new_empty(scheme.code_shape(values.shape), dtype=torch.uint8)
    scale = values.new_empty(scheme.scale_shape(values.shape))
    return codes, scale, values.new_empty(0 if symmetric else scale.shape)


def _dequantize_fake(codes: Tensor, scale: Tensor, least: Tensor, bits: int, *rest: Any) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], codes.shape[-1] * 8 // bits], dtype=rest[-1])


def _layout(shape: Sequence[int], scheme: GroupScheme) -> tuple[int, int, int] | None:
    """How kernels see a weight: groups, their size, and how many lie side by side; None where bytes straddle groups."""
    columns = math.prod(shape[scheme.dim + 1 :])
    groups = math.prod(shape) // scheme.size if math.prod(shape) else 0
    run = scheme.size if columns == 1 else columns
    return None if groups == 0 or run * scheme.bits % 8 else (groups, scheme.size, columns)


def _quantize_pack(
    values: Tensor, bits: int, size: int, dim: int, symmetric: bool
) -> tuple[bytes, tuple[Tensor, Tensor, Tensor]] | None:
    scheme = GroupScheme(bits, size, dim, symmetric)
    check_real("quantize_weight", values)
    scheme.check(values.shape)
    layout = _layout(values.shape, scheme)
    if layout is None or values.dtype not in NARROW_CODES or not is_plain(values):
        return None
    made = _quantize_fake(values, bits, size, dim, symmetric)
    codes, scale, least = made
    addresses = (
        values.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else least.data_ptr(),
    )
    kind = (NARROW_CODES[values.dtype], bits, not symmetric, True, False, 0, 0)
    return _QUANTIZE.pack(_QUANTIZE.size, threads(), *layout, *addresses, *kind), made


def _dequantize_pack(
    codes: Tensor,
    scale: Tensor,
    least: Tensor,
    bits: int,
    size: int,
    dim: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[bytes, Tensor] | None:
    scheme = GroupScheme.of_codes(codes, scale, least, (bits, size, dim, symmetric))
    values = _dequantize_fake(codes, scale, least, bits, dtype)
    layout = _layout(values.shape, scheme)
    sides = (scale,) if symmetric else (scale, least)
    if layout is None or not {dtype, scale.dtype} <= NARROW_CODES.keys():
        return None
    if not is_plain(codes, *sides):
        return None
    if not symmetric and least.dtype != scale.dtype:
        return None
    addresses = (
        codes.data_ptr(),
        scale.data_ptr(),
        0 if symmetric else least.data_ptr(),
        values.data_ptr(),
    )
    kind = (NARROW_CODES[dtype], NARROW_CODES[scale.dtype], bits, not symmetric, True, 0)
    return _DEQUANTIZE.pack(_DEQUANTIZE.size, threads(), *layout, *addresses, *kind), values


quantize_weight = Op(
    "quantize_weight(Tensor values, int bits, int size, int dim, bool symmetric) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_quantize_reference,
    fake=_quantize_fake,
    cpu="ds_quantize",
    pack=_quantize_pack,
    tolerance=Ulp(0),
)

dequantize_weight = Op(
    "dequantize_weight(Tensor codes, Tensor scale, Tensor least, int bits, int size, int dim, "
    "bool symmetric, ScalarType dtype) -> Tensor",
    reference=_dequantize_reference,
    fake=_dequantize_fake,
    cpu="ds_dequantize",
    pack=_dequantize_pack,
    tolerance=Ulp(0),
)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
