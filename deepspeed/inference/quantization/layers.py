# SPDX-License-Identifier: Apache-2.0
"""Linear and Embedding layers whose weight is kept quantized and decoded on use.

The weight of a whole layer becomes a frozen flat uint8 parameter, which may be sharded like any other. The weight of a
layer that is sharded already stays the parameter it is; its slices hold the codes, and gathering decodes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from deepspeed.ops.group_quant import GroupScheme
from deepspeed.runtime.zero.codec import GroupCodec
from deepspeed.runtime.zero.slice_forms import recode
from deepspeed.runtime.zero.tiers import tier_for
from deepspeed.runtime.zero.utils import is_zero_param


def quantized_weight(
    config: Mapping[str, Any], weight: torch.nn.Parameter
) -> tuple[GroupCodec, torch.nn.Parameter]:
    """The codec of a weight, and the parameter that holds it quantized.

    Raises:
        DeepSpeedConfigError: settings that cannot be.
        ValueError: the weight does not divide into groups.
    """
    codec = GroupCodec.of(GroupScheme.of(config), weight)
    if is_zero_param(weight):
        on_host = weight.ds_tensor.device.type == "cpu"
        pinned = on_host and weight.ds_tensor.is_pinned()
        recode(weight, tier_for(weight.ds_device, on_host, pinned), codec)
        return codec, weight.requires_grad_(False)
    return codec, torch.nn.Parameter(codec.encode(weight), requires_grad=False)


def _values(codec: GroupCodec, weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.is_floating_point() else codec.decode(weight)


class QuantizedLinear(torch.nn.Linear):
    """A Linear with a quantized weight.

    Args:
        config: num_bits (4 or 8), group_size, group_dim, symmetric.
        pre_quant_layer: the layer that it replaces; the bias is taken over.

    Raises:
        DeepSpeedConfigError: settings that cannot be.
        ValueError: the weight does not divide into groups.
    """

    def __init__(self, config: Mapping[str, Any], pre_quant_layer: torch.nn.Linear) -> None:
        super().__init__(
            pre_quant_layer.in_features,
            pre_quant_layer.out_features,
            bias=pre_quant_layer.bias is not None,
            device="meta",
        )
        self.config = config
        self.codec, self.weight = quantized_weight(config, pre_quant_layer.weight)
        self.bias = pre_quant_layer.bias
        self.train(pre_quant_layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As Linear."""
        return functional.linear(input, _values(self.codec, self.weight), self.bias)


class QuantizedEmbedding(torch.nn.Embedding):
    """An Embedding with a quantized weight; gradients do not reach it.

    Args:
        config: num_bits (4 or 8), group_size, group_dim, symmetric.
        pre_quant_layer: the layer that it replaces.

    Raises:
        DeepSpeedConfigError: settings that cannot be.
        ValueError: the weight does not divide into groups.
    """

    def __init__(self, config: Mapping[str, Any], pre_quant_layer: torch.nn.Embedding) -> None:
        super().__init__(
            pre_quant_layer.num_embeddings,
            pre_quant_layer.embedding_dim,
            padding_idx=pre_quant_layer.padding_idx,
            max_norm=pre_quant_layer.max_norm,
            norm_type=pre_quant_layer.norm_type,
            device="meta",
        )
        self.config = config
        self.codec, self.weight = quantized_weight(config, pre_quant_layer.weight)
        self.train(pre_quant_layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As Embedding."""
        weight = _values(self.codec, self.weight)
        return functional.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type)


QUANTIZATION_LAYER_MAPPINGS: dict[type[torch.nn.Module], Any] = {
    torch.nn.Linear: QuantizedLinear,
    torch.nn.Embedding: QuantizedEmbedding,
}
