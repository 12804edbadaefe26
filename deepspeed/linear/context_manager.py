# SPDX-License-Identifier: Apache-2.0
"""Models built or loaded with optimized linear layers in place of plain ones."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .config import LoRAConfig, QuantizationConfig
from .optimized_linear import LoRAOptimizedLinear, offload_base_weights
from .quantization import QuantizedLinear


class Init:
    """Context in which the linear layers of models that are built become optimized ones.

    A plain `nn.Linear` is replaced when it is given to its parent module: with a `lora_config`, if the name it gets there
    ends like one of `target_mods`; with a `quant_config` alone, always. Weights can be loaded afterwards as usual;
    `init_lora(model)` then cuts, quantizes and offloads the bases, and makes the adapters.

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
                return None
            return LoRAOptimizedLinear.of(module, self._lora_config, self._quant_config)
        if self._quant_config is not None:
            return QuantizedLinear.of(module, self._quant_config)
        return None


def init_lora(model: nn.Module) -> None:
    """Freeze a model whose weights are in place, and make the adapters of its optimized layers; only they train."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, LoRAOptimizedLinear):
            module.init_lora()
            if not module.disabled:
                module.lora_weight_1.requires_grad_(True)
                module.lora_weight_2.requires_grad_(True)
        elif isinstance(module, QuantizedLinear):
            module.quantize_weight()
    offload_base_weights(model)
