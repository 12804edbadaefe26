# SPDX-License-Identifier: Apache-2.0
"""Frozen weights that are kept quantized and widened for each use."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.fp_quantizer.quantize import FP_Quantize, Quantizer
from deepspeed.utils.errors import explain

from .config import QuantizationConfig
from .frozen_product import FrozenProduct


class QuantizedParameter(nn.Parameter):
    """A parameter whose data are packed bytes; `dequantized()` gives the values.

    Args:
        data: floating tensor to quantize, or what a parameter of this kind held.
        requires_grad: False; anything else is refused.
        quantization_config: bits and group size; None for the defaults.
        quantizer: object that packs, one for each parameter; None for `FP_Quantize`.

    Raises:
        ValueError: `requires_grad` is asked for, or packed data come without their quantizer.
    """

    quantization_config: QuantizationConfig
    quantizer: Quantizer

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quantization_config: QuantizationConfig | None = None,
        quantizer: Quantizer | None = None,
    ) -> QuantizedParameter:
        """Quantize and wrap."""
        if requires_grad:
            raise ValueError(
                explain(
                    "requires_grad=True is not supported with QuantizedParameter",
                    fix="Train adapters beside the quantized weight.",
                )
            )
        config = quantization_config or QuantizationConfig()
        data = torch.empty(0) if data is None else data.detach()
        packs = quantizer or FP_Quantize(config)
        if data.is_floating_point() and not data.is_meta:
            data = packs.quantize(data, q_bits=config.q_bits, q_mantisa_bits=config.mantissa_bits)
        elif not data.is_floating_point() and quantizer is None:
            raise ValueError(
                explain(
                    "packed data need the quantizer that made them", got=f"data of {data.dtype}"
                )
            )
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quantization_config, self.quantizer = config, packs
        return self

    @property
    def is_quantized_now(self) -> bool:
        """Whether the data are packed; on the meta device they are not."""
        return not self.data.is_floating_point()

    @property
    def full_shape(self) -> torch.Size:
        """Shape of the values."""
        return getattr(self.quantizer, "orig_shape", None) or self.shape

    def dequantized(self) -> Tensor:
        """The values, in the shape and dtype they were given in, on the parameter's device."""
        if not self.is_quantized_now:
            return self.data
        config = self.quantization_config
        return self.quantizer.dequantize(
            self.data, q_bits=config.q_bits, q_mantisa_bits=config.mantissa_bits
        )

    def offload(self, revert: bool = False) -> None:
        """Move the packed bytes to CPU memory, or back to the accelerator."""
        self.data = self.data.to(get_accelerator().current_device_name() if revert else "cpu")

    def to(self, *args: Any, **kwargs: Any) -> QuantizedParameter:
        """A parameter of the same values elsewhere; a dtype names that of `dequantized()`."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self._like(self.data.to(device=device, non_blocking=non_blocking))
        if dtype is not None and moved.is_quantized_now:
            moved.quantizer.orig_dtype = dtype  # type: ignore[attr-defined]
        return moved

    def cuda(self, device: Any = None, non_blocking: bool = False) -> QuantizedParameter:
        """A parameter of the same values on a CUDA device."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self) -> QuantizedParameter:
        """A parameter of the same values in CPU memory."""
        return self.to(device="cpu")

    def _like(self, data: Tensor) -> QuantizedParameter:
        return type(self)(data, False, self.quantization_config, copy.copy(self.quantizer))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedParameter:
        if id(self) not in memo:
            memo[id(self)] = self._like(self.data.clone())
        return memo[id(self)]

    def __copy__(self) -> QuantizedParameter:
        return self._like(self.data)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.quantization_config, self.quantizer)

    def __repr__(self) -> str:
        config = self.quantization_config
        return (
            f"QuantizedParameter({tuple(self.full_shape)}, q_bits={config.q_bits}, {self.device})"
        )


def _rebuild(kind: Any, data: Tensor, config: QuantizationConfig, packs: Quantizer) -> Any:
    return kind(data, False, config, packs)


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantized, frozen weight.

    The weight is quantized as soon as it has values: at once, or at the first use after it has been loaded.

    Args:
        input_dim, output_dim, bias: of the layer.
        quantization_config: bits and group size; None for the defaults.
        dtype: of the values before quantization and of the bias.
        device: where it is made; None for the accelerator.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        quantization_config: QuantizationConfig | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
    ) -> None:
        device = get_accelerator().current_device_name() if device is None else device
        super().__init__(input_dim, output_dim, bias=bias, device=device, dtype=dtype)
        self.quantization_config = quantization_config or QuantizationConfig()
        self.weight.requires_grad_(False)
        self.quantize_weight()

    @classmethod
    def of(cls, linear: nn.Linear, quantization_config: QuantizationConfig) -> QuantizedLinear:
        """Take over a layer's weights; they are quantized at the first use, so that they can be loaded before."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.quantization_config = quantization_config
        return layer

    def quantize_weight(self) -> None:
        """Quantize the weight if it has values and is not quantized yet."""
        if not isinstance(self.weight, QuantizedParameter) and not self.weight.is_meta:
            self.weight = QuantizedParameter(
                self.weight.data, quantization_config=self.quantization_config
            )

    def forward(self, input: Tensor) -> Tensor:
        """`[..., input_dim]` to `[..., output_dim]`, in the input's dtype."""
        self.quantize_weight()
        output = FrozenProduct.apply(input, self._values)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _values(self) -> Tensor:
        return self.weight.dequantized()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        requantize(self.weight, state_dict, prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def requantize(weight: nn.Parameter, state_dict: dict[str, Any], key: str) -> None:
    """Quantize the floating values that a state dict holds for a quantized weight, so that they can be loaded."""
    given = state_dict.get(key)
    if isinstance(weight, QuantizedParameter) and given is not None and given.is_floating_point():
        config = weight.quantization_config
        state_dict[key] = copy.copy(weight.quantizer).quantize(
            given.to(weight.device), q_bits=config.q_bits, q_mantisa_bits=config.mantissa_bits
        )
