# SPDX-License-Identifier: Apache-2.0
"""How sharded parameters are held, or sent, in fewer bytes.

A parameter with a `GroupCodec` is encoded whole and the bytes are cut over the ranks, so that host memory, copies to the
device and gathers all see the small form; decoding ends a gather. Whoever reads the gathered parameter sees plain values,
and editing it the public way encodes it again. A `SliceCodec` encodes each rank's slice by itself: on its way only, or
to keep it so (ZeRO++, arXiv:2306.10209).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.ops.group_quant import GroupScheme, dequantize, quantize
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.logging import logger

# Modules whose `weight` may be kept quantized: they read it as a whole matrix.
QUANTIZED_MODULES = (torch.nn.Linear, torch.nn.Embedding)


@dataclass(frozen=True)
class GroupCodec:
    """Group-wise quantization of one parameter into bytes: scales, minima, codes.

    Attributes:
        scheme: bits and groups.
        shape: of the values.
        dtype: of the values, which is that of scales and minima.
    """

    scheme: GroupScheme
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, scheme: GroupScheme, param: torch.Tensor) -> GroupCodec:
        """The codec of a parameter, sharded or whole.

        Raises:
            ValueError: its shape does not divide into groups.
        """
        shape = getattr(param, "ds_shape", param.shape)
        scheme.check(shape)
        return cls(scheme, shape, param.dtype)

    @property
    def _side_bytes(self) -> int:
        """Bytes of the scales, which are those of the minima."""
        return self.shape.numel() // self.scheme.size * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of an encoded parameter."""
        sides = 1 if self.scheme.symmetric else 2
        return sides * self._side_bytes + self.shape.numel() * self.scheme.bits // 8

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Flat uint8 of `nbytes` elements."""
        codes, scale, least = quantize(values, self.scheme)
        # Scales first: in any buffer that is aligned, they are.
        sides = [side.view(-1).view(torch.uint8) for side in (scale, least) if side.numel()]
        return torch.cat([*sides, codes.view(-1)])

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """The values of flat uint8 that `encode` gave."""
        sides = list(self.scheme.scale_shape(self.shape))
        end = self._side_bytes
        scale = data[:end].view(self.dtype).view(sides)
        least = scale
        if not self.scheme.symmetric:
            least = data[end : 2 * end].view(self.dtype).view(sides)
            end *= 2
        codes = data[end : self.nbytes].view(self.scheme.code_shape(self.shape))
        return dequantize(codes, scale, least, self.scheme, self.dtype)


# Values that share a scale in an encoded slice: with fp32 scales, 1.6 % more bytes than the codes at 8 bits.
SLICE_GROUP = 256
# Groups start at multiples of this many values, so that their codes fill whole words.
_GROUP_UNIT = 8


@dataclass(frozen=True)
class SliceCodec:
    """Group-wise symmetric quantization of a flat run of values into bytes: fp32 scales, then codes.

    The last group is filled up with zeros. A decoded value is off by at most half a step of its group, which is
    max|group| / 127 (8 bits) or / 7 (4 bits), and by the rounding of `dtype`.

    Attributes:
        numel: values.
        dtype: of the values.
        bits: 8 or 4.
    """

    numel: int
    dtype: torch.dtype
    bits: int = 8

    @property
    def _group(self) -> int:
        return min(SLICE_GROUP, -(-max(self.numel, 1) // _GROUP_UNIT) * _GROUP_UNIT)

    @property
    def _rows(self) -> int:
        return -(-self.numel // self._group)

    @property
    def _scheme(self) -> GroupScheme:
        return GroupScheme(self.bits, self._group, symmetric=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded run, a multiple of four."""
        return self._rows * (4 + self._group * self.bits // 8)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Flat uint8 of `nbytes` elements for `numel` flat values."""
        # fp32 scales: fp16 ones would overflow for groups of small values.
        whole = values.new_zeros(self._rows, self._group, dtype=torch.float32)
        whole.view(-1)[: self.numel].copy_(values)
        codes, scale, _ = quantize(whole, self._scheme)
        return torch.cat([scale.view(-1).view(torch.uint8), codes.view(-1)])

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """The `numel` flat values of what `encode` gave."""
        sides = 4 * self._rows
        scale = data[:sides].view(torch.float32).view(self._rows, 1, 1)
        codes = data[sides : self.nbytes].view(self._rows, -1)
        values = dequantize(codes, scale, scale, self._scheme, torch.float32)
        return values.view(-1)[: self.numel].to(self.dtype)


class CUDAQuantizer:
    """Symmetric 8-bit quantization of whole tensors by the op `quantizer`, on any device, for callers that know it.

    Attributes:
        target_group_size: values that share a scale, at most.
        quantizer_cuda_module: the op, loaded with the first object.
    """

    target_group_size = 8000
    quantizer_cuda_module: Any = None

    def __init__(self) -> None:
        if CUDAQuantizer.quantizer_cuda_module is None:
            from deepspeed.ops.op_builder import QuantizerBuilder

            CUDAQuantizer.quantizer_cuda_module = QuantizerBuilder().load()

    def quantize(
        self, param: torch.Tensor, groups: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes in the shape of `param`, and the fp32 scales of `groups` groups.

        Args:
            param: floating values, taken as fp16.
            groups: how many; None is the fewest equal ones of at most `target_group_size`.
        """
        if groups is None:
            numel = max(1, param.numel())
            sizes = range(min(numel, self.target_group_size), 0, -1)
            groups = numel // next(size for size in sizes if numel % size == 0)
        op = self.quantizer_cuda_module
        codes, scale = op.quantize(param.to(torch.float16), groups, 8, op.Symmetric)
        return codes, scale

    def dequantize(
        self, quantized_param: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float16
    ) -> torch.Tensor:
        """The values of what `quantize` gave."""
        op = self.quantizer_cuda_module
        return op.dequantize(quantized_param, scale, scale.numel(), 8, op.Symmetric).to(dtype)


def initial_scheme(section: Mapping[str, Any] | None) -> GroupScheme | None:
    """What section `weight_quantization` says of all weights, if it does.

    Raises:
        DeepSpeedConfigError: settings that are not understood.
    """
    if (
        not section
        or not section.get("enabled", True)
        or not section.get("quantized_initialization")
    ):
        return None
    return GroupScheme.of(section["quantized_initialization"])


def named_schemes(section: Mapping[str, Any] | None) -> dict[str, GroupScheme]:
    """What section `weight_quantization` says by parts of module names.

    Raises:
        DeepSpeedConfigError: settings that are not understood.
    """
    if not section or not section.get("enabled", True):
        return {}
    by_name = section.get("post_init_quant") or {}
    return {name: GroupScheme.of(settings) for name, settings in by_name.items()}


def modules_by_name(
    model: torch.nn.Module, schemes: Mapping[str, GroupScheme]
) -> dict[str, GroupScheme]:
    """The full names of the modules that the keys of `schemes` are part of, and whose weights can be quantized.

    Raises:
        DeepSpeedConfigError: two keys are part of one name.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        keys = [key for key in schemes if key in name]
        if not isinstance(module, QUANTIZED_MODULES) or not keys:
            continue
        if len(keys) > 1:
            raise DeepSpeedConfigError(
                explain(
                    f"'weight_quantization.post_init_quant' says two things of module '{name}'",
                    got=f"keys {keys}",
                    expected="one key that is part of its name",
                    fix="make the keys longer",
                )
            )
        found[name] = keys[0]
    for key in schemes.keys() - set(found.values()):
        logger.warning(
            "weight_quantization.post_init_quant: no Linear or Embedding has '%s' in its name", key
        )
    return {name: schemes[key] for name, key in found.items()}


def schemes_of_weights(
    model: torch.nn.Module, section: Mapping[str, Any] | None
) -> dict[torch.nn.Parameter, GroupScheme]:
    """How section `weight_quantization` wants each weight of a model; weights that it leaves alone are not named.

    Raises:
        DeepSpeedConfigError: settings that are not understood, or two for one module.
    """
    first, by_name = initial_scheme(section), named_schemes(section)
    chosen: dict[torch.nn.Parameter, GroupScheme] = {}
    if first is not None:
        for module in model.modules():
            if isinstance(module, QUANTIZED_MODULES) and module.weight.is_floating_point():
                chosen[module.weight] = first
    for name, scheme in modules_by_name(model, by_name).items() if by_name else ():
        weight: Any = model.get_submodule(name).weight
        if weight.is_floating_point():
            chosen[weight] = scheme
    return chosen
