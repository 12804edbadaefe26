# SPDX-License-Identifier: Apache-2.0
"""Layers of a model replaced by those that compress, by name; and an older place of `deepspeed.utils.module_utils`."""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.utils.module_utils import recursive_getattr, recursive_setattr

from .basic_layer import (
    BNLayer_Compress,
    ColumnParallelLinear_Compress,
    Conv2dLayer_Compress,
    Embedding_Compress,
    LinearLayer_Compress,
    RowParallelLinear_Compress,
)
from .layer_parts import Compressed

__all__ = [
    "convert_conv1d_to_linear",
    "is_module_compressible",
    "module_replacement",
    "recursive_getattr",
    "recursive_setattr",
]

# exact types: a subclass may compute something else
_TYPES: dict[type, type[Compressed]] = {
    nn.Linear: LinearLayer_Compress,
    nn.Embedding: Embedding_Compress,
    nn.Conv2d: Conv2dLayer_Compress,
    nn.BatchNorm2d: BNLayer_Compress,
}


def _parallel_type(module: nn.Module, mpu: Any) -> tuple[type[Compressed], str] | None:
    if isinstance(module, getattr(mpu, "ColumnParallelLinear", ())):
        return ColumnParallelLinear_Compress, "gather_output"
    if isinstance(module, getattr(mpu, "RowParallelLinear", ())):
        return RowParallelLinear_Compress, "input_is_parallel"
    return None


def compressed_type(module: nn.Module, mpu: Any = None) -> type[Compressed] | None:
    """The class that a layer becomes, or already is; None for one that cannot be compressed."""
    if isinstance(module, Compressed):
        return type(module)
    parallel = _parallel_type(module, mpu)
    return parallel[0] if parallel else _TYPES.get(type(module))


def is_module_compressible(module: nn.Module, mpu: Any = None) -> bool:
    """Whether a layer is a linear layer, an embedding, a 2-d convolution or a 2-d batch norm, or a layer of `mpu`'s."""
    return compressed_type(module, mpu) is not None


def module_replacement(
    model: nn.Module,
    module_name: str,
    compression_technique: dict[str, list[Any]] | None = None,
    mpu: Any = None,
) -> nn.Module:
    """Make a layer one that compresses, in place: its weights, their names and its hooks stay.

    Args:
        model: holds the layer.
        module_name: its dotted name.
        compression_technique: technique -> the arguments of the layer's `enable_<technique>`.
        mpu: Megatron's, for its layers.

    Raises:
        ValueError: no such layer can be compressed.
    """
    layer: Any = recursive_getattr(model, module_name)
    kind = compressed_type(layer, mpu)
    if kind is None:
        raise ValueError(
            f"{module_name} is a {type(layer).__name__}, which cannot be compressed: leave it out of the configuration"
        )
    if not isinstance(layer, Compressed):
        parallel = _parallel_type(layer, mpu)
        if parallel is None:
            kind.adopt(layer)
        else:
            kind.adopt_parallel(layer, mpu, parallel[1])  # type: ignore[attr-defined]
    for technique, arguments in (compression_technique or {}).items():
        getattr(layer, f"enable_{technique}")(*arguments)
    return layer


def convert_conv1d_to_linear(model: nn.Module, convert_type: type[nn.Module]) -> nn.Module:
    """Replace layers like GPT-2's `Conv1D`, whose weight is `[in, out]`, by linear layers.

    Args:
        model: changed in place; an engine's module is its model.
        convert_type: the class to replace.

    Returns:
        The model; a linear layer where the model itself is such a layer.
    """
    inner: nn.Module = getattr(model, "module", model)
    if isinstance(inner, convert_type):
        return _linear(inner)
    made: dict[nn.Module, nn.Linear] = {}
    for parent in list(inner.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, convert_type):
                if child not in made:
                    made[child] = _linear(child)
                setattr(parent, name, made[child])
    return model


def _linear(layer: Any) -> nn.Linear:
    features = layer.weight.shape
    linear = nn.Linear(features[0], features[1], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(
        layer.weight.data.t().contiguous(), requires_grad=layer.weight.requires_grad
    )
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear.train(layer.training)
