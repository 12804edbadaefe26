# SPDX-License-Identifier: Apache-2.0
"""Weights of Megatron checkpoints as whole numbers, and their scales, layer by layer, for inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import explain

# what a weight's name says it is -> the list of its scales; others go with the attention's output
_KINDS = {
    "query_key_value": "qkv_scales",
    "mlp.dense_4h_to_h": "mlp4hh_scales",
    "mlp.dense_h_to_4h": "mlph4h_scales",
}
# the scales of a layer, in the order of what needs them
_ORDER = ("qkv_scales", "dense_scales", "mlph4h_scales", "mlp4hh_scales")
_TREATED = ("attention.dense.weight", "mlp.dense_4h_to_h.weight", "mlp.dense_h_to_4h.weight")


class WeightQuantization:
    """Rounds weights to whole numbers of 8 bits or fewer, and keeps what each is to be multiplied by.

    Args:
        mlp_extra_grouping: twice as many groups for the weights of MLPs.
        mp_size: tensor-parallel ranks that the weights are of.

    Attributes:
        dense_scales, qkv_scales, mlp4hh_scales, mlph4h_scales: one tensor `[1, groups]` a layer.
    """

    def __init__(self, mlp_extra_grouping: bool = True, mp_size: int = 1) -> None:
        self.dense_scales: list[Tensor] = []
        self.qkv_scales: list[Tensor] = []
        self.mlp4hh_scales: list[Tensor] = []
        self.mlph4h_scales: list[Tensor] = []
        self.mlp_extra_grouping, self.mp_size = mlp_extra_grouping, mp_size

    def quantize_data(
        self, data: Tensor, quantize_bits: int, groups: int, key: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Round a weight.

        Args:
            data: any shape; groups are consecutive runs of its values.
            quantize_bits: up to 8.
            groups: divides the number of values.
            key: ignored.

        Returns:
            Whole numbers of `data`'s shape (int8), and what the values were multiplied by (fp32, `[groups, 1]`).
        """
        values = data.float().reshape(groups, -1)
        # a little more than the range, so that zeros have a scale
        scale = 2**quantize_bits / (2 * values.abs().amax(1, True) + 1e-5)
        half = 2 ** (quantize_bits - 1)
        whole = (values * scale).round().clamp(-half, half - 1).to(torch.int8)
        return whole.reshape(data.shape), scale

    def is_mlp(self, data: Tensor, merge_count: int = 1) -> bool:
        """Whether a weight's sides are as 4 to 1, counting the parts that it is one of."""
        first, second = data.shape[:2]
        ranks = self.mp_size * merge_count
        return first * ranks / second == 4 or second * ranks / first == 4

    def is_qkv(self, data: Tensor) -> bool:
        """Whether a weight's sides are as 3 to 1."""
        first, second = data.shape[:2]
        return first * self.mp_size / second == 3 or second * self.mp_size / first == 3

    def Quantize(
        self,
        value_list: list[Tensor],
        quantize_bits: int,
        groups: int,
        key: str,
        merge_dim: int = 0,
    ) -> list[Tensor]:
        """Round the parts of one weight, in the list, and keep their scales under what its name says.

        Args:
            value_list: one weight, or its parts that are going to be joined.
            quantize_bits: up to 8.
            groups: of each part.
            key: the weight's name.
            merge_dim: along which the parts are joined; their scales are in the same order.
        """
        if self.mlp_extra_grouping and self.is_mlp(value_list[0], len(value_list)):
            groups *= 2
        scales = []
        for number, data in enumerate(value_list):
            value_list[number], scale = self.quantize_data(data, quantize_bits, groups, key)
            scales.append(scale)
        inverse = 1 / torch.cat(scales, dim=merge_dim).view(1, -1)
        kind = next((name for word, name in _KINDS.items() if word in key), "dense_scales")
        getattr(self, kind).append(inverse)
        return value_list

    def merge_layer_scales(self, layer_scales: list[Tensor]) -> Tensor:
        """Scales of one layer, each `[1, groups]`, as `[1, weights, most groups]`, with zeros where there are fewer."""
        width = max(scale.shape[-1] for scale in layer_scales)
        padded = [
            torch.nn.functional.pad(scale.reshape(1, -1), (0, width - scale.shape[-1]))
            for scale in layer_scales
        ]
        return torch.cat(padded).unsqueeze(0)

    def merge_scales(self) -> Tensor:
        """All scales: `[layers, 4, most groups]`, those of query, key and value first, then dense, h-to-4h and 4h-to-h."""
        layers = zip(*(getattr(self, kind) for kind in _ORDER), strict=True)
        return torch.cat([self.merge_layer_scales(list(layer)) for layer in layers])

    def merge_scales_split(self, split_count: int) -> list[Tensor]:
        """`merge_scales` for each of `split_count` ranks that share the weights: each has its part of the groups.

        Raises:
            ValueError: the groups do not divide into as many parts.
        """
        parts = []
        for rank in range(split_count):
            one = WeightQuantization(self.mlp_extra_grouping, self.mp_size)
            for kind in _ORDER:
                for scale in getattr(self, kind):
                    if scale.shape[-1] % split_count:
                        raise ValueError(
                            explain(
                                "scales cannot be divided over ranks",
                                got=f"{scale.shape[-1]} groups for {split_count} ranks",
                                fix="Quantize with a multiple of the ranks as groups.",
                            )
                        )
                    getattr(one, kind).append(scale.chunk(split_count, -1)[rank])
            parts.append(one.merge_scales())
        return parts

    def sd_quantize_megatron(
        self, sd: Mapping[str, Tensor], quantize_bits: int, groups: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Round the weights of attention and MLPs of a Megatron state dict.

        Returns:
            The state dict with whole numbers in their places, and `merge_scales`.
        """
        found = dict(sd)
        for key, value in sd.items():
            if any(word in key for word in (*_TREATED, "attention.query_key_value.weight")):
                found[key] = self.Quantize([value], quantize_bits, groups, key)[0]
        return found, self.merge_scales()

    def model_quantize(
        self, model: Any, quantize_policy: Any, quantize_bits: int, groups: int
    ) -> Any:
        """Refuse the layers of a model, which another door quantizes.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            explain(
                "WeightQuantization.model_quantize is not available in this version",
                fix="Use the section 'weight_quantization' (ZeRO-Inference) or deepspeed.compression",
            )
        )
