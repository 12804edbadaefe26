# SPDX-License-Identifier: Apache-2.0
"""What an optimized linear layer is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class LoRAConfig:
    """Adapters, and how their frozen base is kept.

    Attributes:
        lora_r: rank of the adapters.
        lora_alpha: the adapters' output is multiplied by `lora_alpha / lora_r`.
        base_weight_sharding: over how many ranks (1, or all of them) the base weight is cut.
        offload: keep base weights in CPU memory between uses.
        offload_ratio: share of the base weights, 0 to 1, for which that holds when `offload` is off.
        delay_lora_init: make adapters only in `init_lora`, after the base has been loaded.
        target_mods: ends of the names of the layers that get adapters inside `Init`.
    """

    lora_r: int = 64
    lora_alpha: float = 16.0
    base_weight_sharding: int = 1
    offload: bool = False
    offload_ratio: float = 0.0
    delay_lora_init: bool = False
    target_mods: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )


@dataclass
class QuantizationConfig:
    """How a frozen weight is quantized.

    Attributes:
        q_bits: 8 (e4m3), 6 (e3m2), 12 (e4m7) or 4 (e2m1).
        mantissa_bits: follows from `q_bits`; kept for callers that give it.
        group_size: values that share a scale.
        q_dtype: dtype of the packed values.
    """

    q_bits: int = 8
    mantissa_bits: int = 3
    group_size: int = 512
    q_dtype: torch.dtype = torch.uint8
