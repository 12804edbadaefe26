# SPDX-License-Identifier: Apache-2.0
"""A decoder's weights in the form that its program reads: packed products, norms, embeddings.

Packing re-houses the model's own params: they become views of the packed matrix, so that no weight is stored twice and
the model itself goes on working. On CPUs, fp32 products of few rows run at memory speed only where a matrix lies
with its inputs as rows (measured: 1.3 to 1.6 times as fast as the other way round); elsewhere the usual layout stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Product:
    """``x @ weight + bias`` for a matrix of rows, over the packed weights of one or more layers.

    Args:
        layers: `nn.Linear`, or modules of transformers' `Conv1D` form (weights of in × out), with as many inputs each.
            Their params become views of what is packed here.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        weights = [_in_by_out(layer) for layer in layers]
        first = weights[0]
        self.by_input = first.device.type == "cpu" and first.dtype == torch.float32
        with torch.no_grad():
            if self.by_input:
                packed = torch.cat([w.detach() for w in weights], dim=1).contiguous()
            else:
                packed = torch.cat([w.detach().t() for w in weights], dim=0).contiguous()
            self.weight = packed
            self.bias = _packed_bias(layers, weights)
        start = 0
        for layer, weight in zip(layers, weights, strict=True):
            end = start + weight.shape[1]
            view = packed[:, start:end] if self.by_input else packed[start:end].t()
            layer.weight.data = view if is_conv1d(layer) else view.t()
            if layer.bias is not None and self.bias is not None:
                layer.bias.data = self.bias[start:end]
            start = end

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to `[rows, inputs]`; returns `[rows, outputs]`."""
        if not self.by_input:
            return functional.linear(x, self.weight, self.bias)
        if self.bias is None:
            return x.mm(self.weight)
        return torch.addmm(self.bias, x, self.weight)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is in × out."""
    return type(layer).__name__ == "Conv1D"


def packable(layer: nn.Module) -> bool:
    """Whether a layer is one that `Product` knows: neither quantized nor wrapped by an adapter."""
    return type(layer) is nn.Linear or is_conv1d(layer)


def _in_by_out(layer: nn.Module) -> Tensor:
    return layer.weight if is_conv1d(layer) else layer.weight.t()


def _packed_bias(layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            layer.bias.detach() if layer.bias is not None else weight.new_zeros(weight.shape[1])
            for layer, weight in zip(layers, weights, strict=True)
        ]
    )


@dataclass(frozen=True)
class Layer:
    """One block: what it needs besides the cache."""

    norm_1: Callable[[Tensor], Tensor]
    """Before attention."""
    qkv: Product
    """Queries, keys and values in one product."""
    out: Product
    """After attention."""
    norm_2: Callable[[Tensor], Tensor]
    """Before the inner layer."""
    mlp: Callable[[Tensor], Tensor]
    """The inner layer."""


@dataclass(frozen=True)
class DecoderWeights:
    """A causal language model as data."""

    embed: Callable[[Tensor, Tensor], Tensor]
    """Token ids and positions, `[batch, tokens]` each, to `[batch, tokens, width]`."""
    layers: Sequence[Layer]
    """The blocks in order."""
    norm: Callable[[Tensor], Tensor]
    """After the last block."""
    head: Product
    """To the vocabulary."""
    heads: int
    """Heads of the queries."""
    kv_heads: int
    """Heads of keys and values; divides `heads`."""
    head_dim: int
    """Width of a head."""
    positions: int
    """Longest sequence that the model takes, in tokens."""
    rotate: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """Positions 0 .. n-1 to the cosines and sines of rotary embedding, `[n, head_dim]`; None without."""
