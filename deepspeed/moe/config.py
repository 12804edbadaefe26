# SPDX-License-Identifier: Apache-2.0
"""The section ``expert_parallel``: experts of a Hugging Face model spread over ranks (AutoEP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from ..runtime.config_utils import PlainSection

PRESETS = ("qwen3_5_moe", "mixtral", "deepseek_v2", "deepseek_v3", "qwen3_moe")

# Says "not given, take the preset's", which differs from null ("gate and up are one weight").
UNSET = type("Unset", (), {"__repr__": lambda self: "UNSET"})()


class AutoEPConfig(PlainSection):
    """``expert_parallel``."""

    section: ClassVar[str] = "expert_parallel"

    enabled: bool = Field(default=False, description="Spread experts over ranks.")
    autoep_size: int = Field(default=1, ge=1, description="Ranks over which experts are spread.")
    expert_tensor_parallel_size: int = Field(
        default=1, ge=1, description="Ranks that split one expert."
    )
    validate_folding_routing: bool = Field(
        default=False, description="Check routing against one rank."
    )
    async_split_plan: bool = Field(
        default=False, description="Exchange the token counts asynchronously."
    )
    preset_model: str | None = Field(default=None, description=f"One of {', '.join(PRESETS)}.")
    moe_layer_pattern: str | None = Field(
        default=None, description="Regex of the MoE layers' names."
    )
    expert_pattern: str | None = Field(
        default=None, description="Regex of the experts' names in it."
    )
    router_pattern: str | None = Field(
        default=None, description="Regex of the router's name in it."
    )
    use_grouped_mm: bool = Field(
        default=True, description="One grouped product for all local experts."
    )
    disable_triton_grouped_mm: bool = Field(default=False, description="Do not use Triton for it.")
    route_norm: bool | None = Field(default=None, description="Normalise the chosen scores.")
    route_scale: float = Field(default=1.0, description="Factor on the chosen scores.")
    score_apply: str = Field(
        default="auto", description="Apply scores auto, pre or post the experts."
    )
    combine_impl: str = Field(default="auto", description="auto, weighted_sum or legacy_bmm.")
    row_weighting_impl: str = Field(default="auto", description="Who weights the rows.")
    gate_up_impl: str = Field(
        default="separate", description="separate or fused gate and up products."
    )
    comm_backend: str = Field(default="comm", description="Who moves tokens between ranks.")
    comm_num_sm: int = Field(default=12, description="Multiprocessors given to that.")
    comm_qp_margin: int = Field(default=4, description="Spare queue pairs of that.")
    comm_max_tokens_per_rank: int = Field(
        default=0, description="Bound of tokens a rank; 0 has none."
    )
    num_expert_groups: int | None = Field(
        default=None, description="Groups for group-limited routing."
    )
    num_limited_groups: int | None = Field(default=None, description="Groups a token may use.")
    score_func: str = Field(default="auto", description="auto, softmax or sigmoid.")
    top_k: int | str = Field(default="auto", description="Experts a token uses, or auto.")
    load_balance_coeff: float | None = Field(
        default=None, description="Not supported: leave it null."
    )
    routed_scaling_factor: float | str = Field(
        default="auto", description="Factor on routed results."
    )
    expert_w1: str | None = Field(default=None, description="Name of the gate (or up) weight.")
    expert_w2: str | None = Field(default=None, description="Name of the down weight.")
    expert_w3: Any = Field(
        default=UNSET, description="Name of the up weight; null: fused with the gate."
    )
    num_experts_attr: str | None = Field(
        default=None, description="Config attribute: number of experts."
    )
    top_k_attr: str | None = Field(
        default=None, description="Config attribute: experts a token uses."
    )
    has_shared_experts: bool | None = Field(
        default=None, description="Whether there are shared experts."
    )
    shared_experts_pattern: str | None = Field(
        default=None, description="Name of the shared experts."
    )
    shared_experts_gate_pattern: str | None = Field(default=None, description="Name of their gate.")
    expert_activation: str | None = Field(default=None, description="Activation inside an expert.")

    @property
    def _load_balance_coeff_explicit(self) -> bool:
        return "load_balance_coeff" in self.model_fields_set

    @staticmethod
    def refused_coefficient(value: Any) -> str:
        """What is said of any `load_balance_coeff`."""
        return (
            "load_balance_coeff, which would train expert_bias, is not supported; leave it null or omit it, "
            f"got {value!r}"
        )

    @field_validator("load_balance_coeff", mode="before")
    @classmethod
    def _no_coefficient(cls, value: Any) -> None:
        if value is not None:
            raise ValueError(cls.refused_coefficient(value))

    @model_validator(mode="after")
    def _known_words(self) -> AutoEPConfig:
        choices: dict[str, tuple[str, ...]] = {
            "score_apply": ("auto", "pre", "post"),
            "combine_impl": ("auto", "weighted_sum", "legacy_bmm"),
            "score_func": ("auto", "softmax", "sigmoid"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is one of {allowed}, got {getattr(self, key)!r}")
        for key in ("top_k", "routed_scaling_factor"):
            value = getattr(self, key)
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"{key} is a number or 'auto', got {value!r}")
        if isinstance(self.top_k, int) and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}")
        return self


def get_expert_parallel_config(param_dict: Mapping[str, Any]) -> AutoEPConfig:
    """Parse section ``expert_parallel`` of a whole configuration."""
    return AutoEPConfig.of(param_dict)
