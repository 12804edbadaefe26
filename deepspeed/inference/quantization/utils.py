# SPDX-License-Identifier: Apache-2.0
"""Group-wise quantization of one tensor, by a configuration's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepspeed.ops.group_quant import GroupScheme, dequantize, quantize
from deepspeed.runtime.zero.codec import QUANTIZED_MODULES as WEIGHT_QUANTIZATION_LAYERS

__all__ = ["WEIGHT_QUANTIZATION_LAYERS", "DeQuantizer", "Quantizer"]


class Quantizer:
    """Quantizes tensors.

    Args:
        config: num_bits (4 or 8), group_size, group_dim, symmetric.

    Raises:
        DeepSpeedConfigError: settings that cannot be.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.scheme = GroupScheme.of(config)

    def quantize(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and minima of a tensor, which is left as it is.

        Args:
            tensor: fp32, bf16 or fp16.

        Returns:
            uint8 codes of its shape (the last dimension halved for 4 bits); scales and minima of its dtype, in which
            groups take the place of `group_dim`, followed by a 1. Symmetric quantization has no minima: empty.

        Raises:
            ValueError: `group_dim` does not divide into groups.
        """
        return quantize(tensor, self.scheme)


class DeQuantizer:
    """Turns codes back into values.

    Args:
        config: as for `Quantizer`.
        dtype: of the values.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.scheme = GroupScheme.of(config)

    def dequantize(
        self, tensor: torch.Tensor, quant_scale: torch.Tensor, quant_min: torch.Tensor
    ) -> torch.Tensor:
        """The values that `Quantizer.quantize`'s three tensors stand for."""
        return dequantize(tensor, quant_scale, quant_min, self.scheme, self.dtype)
