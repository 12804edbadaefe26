# SPDX-License-Identifier: Apache-2.0
"""What there is to know of a family of mixture-of-experts models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MoEModelPreset:
    """Where a family keeps its router and experts, and how it routes.

    Attributes:
        name: the preset's name.
        hf_model_types: `config.model_type` of the models that it serves.
        moe_layer_pattern: regular expression that is found in the names of the layers.
        router_name: attribute of the router in a layer.
        experts_name: attribute of the experts in a layer.
        listed_names: for experts that are modules: the gate, down and up layer's name, in the order of preference.
        top_k_attrs: attributes of the model's configuration that tell `top_k`, in the order of preference.
        score_func: "softmax" or "sigmoid".
        route_norm: whether chosen scores are normalised; a string names the attribute of the configuration.
        logits_in_fp32: whether the router computes in fp32.
        scores_in_logits_dtype: whether scores are rounded to the logits' dtype: never, "always" or with "old" versions.
        shared_experts_name, shared_experts_gate_name: attributes of experts that see all tokens; empty for none.
        masked_score_of_old: what experts of other groups score in transformers 4; from 5 on it is minus infinity.
        supports_expert_bias: whether the family chooses by a bias that balances the experts' load.
        unsupported_router_bias_names: router biases that are refused.
        unsupported_hf_model_type_notes: near model types that are refused, with what to do.
    """

    name: str
    hf_model_types: tuple[str, ...]
    moe_layer_pattern: str = r"(^|\.)layers\.\d+\.(mlp|block_sparse_moe|feed_forward)$"
    router_name: str = "gate"
    experts_name: str = "experts"
    listed_names: tuple[tuple[str, str, str], ...] = (
        ("gate_proj", "down_proj", "up_proj"),
        ("w1", "w2", "w3"),
    )
    top_k_attrs: tuple[str, ...] = ("num_experts_per_tok",)
    score_func: str = "softmax"
    route_norm: bool | str = True
    logits_in_fp32: bool = False
    scores_in_logits_dtype: str = "never"
    shared_experts_name: str = ""
    shared_experts_gate_name: str = ""
    masked_score_of_old: float = 0.0
    supports_expert_bias: bool = False
    unsupported_router_bias_names: tuple[str, ...] = ()
    unsupported_hf_model_type_notes: Mapping[str, str] = field(default_factory=dict)
