# SPDX-License-Identifier: Apache-2.0
"""Linear layers for fine-tuning: a frozen base, sharded, offloaded or quantized, and trainable LoRA adapters."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["*", "LoRAConfig", "QuantizationConfig"],
        ".context_manager": ["*", "Init", "init_lora"],
        ".optimized_linear": [
            "*",
            "LoRAOptimizedLinear",
            "OptimizedLinear",
            "lora_state_dict",
            "offload_base_weights",
        ],
        ".quantization": ["*", "QuantizedLinear", "QuantizedParameter"],
    },
)
