# SPDX-License-Identifier: Apache-2.0
"""Models built or loaded with optimized linear layers in place of plain ones."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .config import LoRAConfig, QuantizationConfig
from .optimized_linear import LoRAOptimizedLinear, offload_base_weights
from .quantization import QuantizedLinear

# on layers that an `Init` left plain because of their names: what they would have become
_LEFT_OUT = "_ds_left_out"

Layer = TypeVar("Layer", nn.Linear, LoRAOptimizedLinear, QuantizedLinear)


class Init:
    """Context in which the linear layers of models that are built become optimized ones.

    A plain `nn.Linear` is replaced when it is given to its parent module: with a `lora_config`, if the name it gets there
    ends like one of `target_mods`; with a `quant_config` alone, always. Weights can be loaded afterwards as usual;
    `init_lora(model)` then cuts, quantizes and offloads the bases, and makes the adapters. A model without a single
    layer of such a name gets them in all its linear layers. Optimized layers of an fp32 model hold bf16 weights; what
    they give has the dtype of what they are given.

    Args:
        lora_config: adapters; None for none.
        quant_config: quantization of the base; None for none.

    Example:
        >>> with deepspeed.linear.Init(lora_config=LoRAConfig(lora_r=16)):
        ...     model = AutoModelForCausalLM.from_pretrained(path)
        >>> deepspeed.linear.init_lora(model)
    """

    def __init__(
        self,
        lora_config: LoRAConfig | None = None,
        quant_config: QuantizationConfig | None = None,
    ) -> None:
        self._lora_config, self._quant_config = lora_config, quant_config
        self._hook: Any = None

    def __enter__(self) -> Init:
        self._hook = register_module_module_registration_hook(self._replace)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Layers are plain again."""
        self._hook.remove()

    def _replace(self, parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
        # An optimized layer's own adapters are no layers of the model.
        if type(module) is not nn.Linear or isinstance(parent, LoRAOptimizedLinear):
            return None
        if self._lora_config is not None:
            if not name.endswith(tuple(self._lora_config.target_mods)):
                module.__dict__[_LEFT_OUT] = (self._lora_config, self._quant_config)
                return None
            return LoRAOptimizedLinear.of(
                _in_16_bits(module), self._lora_config, self._quant_config
            )
        if self._quant_config is not None:
            return QuantizedLinear.of(_in_16_bits(module), self._quant_config)
        return None


def init_lora(model: nn.Module) -> None:
    """Freeze a model whose weights are in place, and make the adapters of its optimized layers; only they train."""
    model.requires_grad_(False)
    _take_in_the_left_out(model)
    for module in list(model.modules()):
        if isinstance(module, LoRAOptimizedLinear):
            _in_16_bits(module)
            module.init_lora()
            if not module.disabled:
                module.lora_weight_1.requires_grad_(True)
                module.lora_weight_2.requires_grad_(True)
        elif isinstance(module, QuantizedLinear):
            _in_16_bits(module).quantize_weight()
    offload_base_weights(model)


def _in_16_bits(layer: Layer) -> Layer:
    """The layer itself, its fp32 weights turned into bf16 ones (loaders may put those of a checkpoint in their place)."""
    return layer.bfloat16() if layer.weight.dtype == torch.float32 else layer


def _take_in_the_left_out(model: nn.Module) -> None:
    """Forget which layers were left out for their names; where all were, optimize all of them."""
    none = not any(isinstance(module, LoRAOptimizedLinear) for module in model.modules())
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            left_out = module.__dict__.pop(_LEFT_OUT, None)
            if none and left_out is not None and isinstance(module, nn.Linear):
                setattr(parent, name, LoRAOptimizedLinear.of(_in_16_bits(module), *left_out))
