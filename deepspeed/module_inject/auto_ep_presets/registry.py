# SPDX-License-Identifier: Apache-2.0
"""All presets, and which of them a model's type asks for."""

from __future__ import annotations

from .base import MoEModelPreset

_CORRECTION_BIAS = "e_score_correction_bias"

PRESET_MODELS: dict[str, MoEModelPreset] = {
    preset.name: preset
    for preset in (
        MoEModelPreset(
            "mixtral",
            ("mixtral",),
            scores_in_logits_dtype="old",
            unsupported_router_bias_names=(_CORRECTION_BIAS,),
        ),
        MoEModelPreset(
            "qwen3_moe",
            ("qwen3_moe", "qwen2_moe"),
            route_norm="norm_topk_prob",
            scores_in_logits_dtype="always",
            shared_experts_name="shared_expert",
            shared_experts_gate_name="shared_expert_gate",
            unsupported_router_bias_names=(_CORRECTION_BIAS,),
        ),
        MoEModelPreset(
            "qwen3_5_moe",
            ("qwen3_5_moe_text",),
            scores_in_logits_dtype="always",
            shared_experts_name="shared_expert",
            shared_experts_gate_name="shared_expert_gate",
            unsupported_router_bias_names=(_CORRECTION_BIAS,),
            unsupported_hf_model_type_notes={
                "qwen3_5_moe": "the whole model sees pictures as well; pass its text model, of the type "
                "qwen3_5_moe_text"
            },
        ),
        MoEModelPreset(
            "deepseek_v2",
            ("deepseek_v2",),
            route_norm=False,
            logits_in_fp32=True,
            shared_experts_name="shared_experts",
            unsupported_router_bias_names=(_CORRECTION_BIAS,),
        ),
        MoEModelPreset(
            "deepseek_v3",
            ("deepseek_v3",),
            score_func="sigmoid",
            route_norm="norm_topk_prob",
            logits_in_fp32=True,
            shared_experts_name="shared_experts",
            supports_expert_bias=True,
        ),
    )
}


def preset_name_for_hf_model_type(model_type: str | None) -> str | None:
    """The preset that serves a model type; None where there is none."""
    for name, preset in PRESET_MODELS.items():
        if model_type in preset.hf_model_types:
            return name
    return None


def unsupported_preset_for_hf_model_type(
    model_type: str | None,
) -> tuple[str, MoEModelPreset] | None:
    """The preset that refuses a model type by name, with its own; None where none does."""
    for name, preset in PRESET_MODELS.items():
        if model_type in preset.unsupported_hf_model_type_notes:
            return name, preset
    return None
