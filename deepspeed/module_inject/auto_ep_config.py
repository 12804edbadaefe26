# SPDX-License-Identifier: Apache-2.0
"""What `expert_parallel` asks for, checked against the job and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed.moe.config import AutoEPConfig as _Section
from deepspeed.utils.errors import explain

from .auto_ep_presets.base import MoEModelPreset
from .auto_ep_presets.registry import PRESET_MODELS

__all__ = [
    "AutoEPConfig",
    "MoELayerSpec",
    "MoEModelPreset",
    "PRESET_MODELS",
    "fill_autoep_config_from_hf",
    "parse_autoep_config",
    "validate_autoep_config",
    "validate_autoep_post_detection",
]


class AutoEPConfig(_Section):
    """The section's settings as they are given: `validate_autoep_config` looks at them."""

    def __init__(self, **settings: Any) -> None:
        self.__setstate__(type(self).model_construct(**settings).__getstate__())


@dataclass
class MoELayerSpec:
    """One layer of experts of a model, and how it routes.

    Attributes:
        moe_module_name: the layer's name in the model.
        model_family: name of the preset, or "custom".
        router_name, experts_name: attributes of the layer.
        expert_storage: "fused_3d" (stacked weights) or "module_list".
        expert_w1_name, expert_w2_name, expert_w3_name: the gate, down and up weights; w3 None where gate and up are one.
        num_experts, top_k, hidden_size, ffn_hidden_size: sizes.
        score_func, score_apply, route_norm, route_scale, gate_bias: see `TokenChoiceTopKRouter`.
        return_router_logits: the layer returns `(output, logits)`.
        router_logits_capture_target: whose output a model collects as router logits: "none", "router" or "moe_block".
        router_logits_capture_index, router_logits_capture_layer_name: which output, of modules of what name.
        has_shared_experts, shared_experts_name, shared_experts_gate_name: experts that see all tokens.
        num_expert_groups, num_limited_groups: group-limited routing.
        supports_expert_bias: whether the family has a bias that balances the load.
        logits_in_fp32, scores_in_logits_dtype, masked_score: see `MoEModelPreset`.
        unsupported_router_bias_names: router biases that are refused.
    """

    moe_module_name: str
    model_family: str
    router_name: str
    experts_name: str
    expert_storage: str
    expert_w1_name: str
    expert_w2_name: str
    expert_w3_name: str | None
    num_experts: int
    top_k: int
    hidden_size: int
    ffn_hidden_size: int
    score_func: str
    score_apply: str
    route_norm: bool
    gate_bias: bool
    return_router_logits: bool
    router_logits_capture_target: str
    router_logits_capture_index: int | None
    router_logits_capture_layer_name: str | None
    has_shared_experts: bool
    shared_experts_name: str
    shared_experts_gate_name: str
    route_scale: float = 1.0
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    supports_expert_bias: bool = True
    logits_in_fp32: bool = False
    scores_in_logits_dtype: bool = False
    masked_score: float = -math.inf
    unsupported_router_bias_names: Sequence[str] = field(default=())


def parse_autoep_config(settings: Mapping[str, Any]) -> AutoEPConfig:
    """Read the section's settings.

    Raises:
        ValueError: a value that cannot be, such as any `load_balance_coeff`.
    """
    checked = _Section(**settings)
    return AutoEPConfig(**{name: getattr(checked, name) for name in checked.model_fields_set})


def fill_autoep_config_from_hf(config: Any, hf_config: Any) -> None:
    """Set the routing that is not given, in place, to that of a model's own configuration."""
    greedy = (
        getattr(hf_config, "topk_method", None) == "greedy"
    )  # DeepSeek-V2-Lite has groups of no use
    for name, theirs in (("num_expert_groups", "n_group"), ("num_limited_groups", "topk_group")):
        if getattr(config, name) is None and not greedy:
            setattr(config, name, getattr(hf_config, theirs, None))
    if config.routed_scaling_factor == "auto" and "route_scale" not in config.model_fields_set:
        scale = getattr(hf_config, "routed_scaling_factor", None)
        if scale is not None:
            config.route_scale = float(scale)


def validate_autoep_config(
    config: Any,
    world_size: int,
    pp_size: int,
    tp_size: int,
    sp_size: int,
    *,
    zero_stage: int = 0,
    zero_offload_optimizer: bool = False,
    zero_offload_param: bool = False,
    mpu: Any = None,
    tp_preset_model: str | None = None,
    use_data_before_expert_parallel: bool = False,
    deepcompile_enabled: bool = False,
) -> None:
    """Check the settings against a job's sizes; what follows them concerns tensor parallelism beside only.

    Raises:
        ValueError: settings that cannot be, or that do not go together.
    """
    _check_values(config)
    if not config.enabled:
        return
    _check_sizes(config, world_size, pp_size, tp_size, sp_size)
    if tp_size <= 1:
        return
    rules = (
        (pp_size > 1, "AutoEP+AutoTP folding works with pp_size=1 only", f"pp_size={pp_size}"),
        (
            zero_stage == 3,
            "AutoEP+AutoTP folding does not go with ZeRO stage 3, which is a separate ZeRO-3 composition lane",
            "zero_optimization.stage 3",
        ),
        (config.autoep_size == 1, "AutoTP needs autoep_size > 1 beside it", "autoep_size=1"),
        (
            use_data_before_expert_parallel,
            "AutoEP+AutoTP folding does not go with use_data_before_expert_parallel_",
            "true",
        ),
        (
            zero_offload_optimizer or zero_offload_param,
            "AutoEP+AutoTP folding does not go with ZeRO offload",
            "offload_optimizer or offload_param",
        ),
        (
            deepcompile_enabled,
            "DeepCompile does not go with AutoEP+AutoTP folding",
            "compile.deepcompile",
        ),
        (
            None not in (tp_preset_model, config.preset_model)
            and tp_preset_model != config.preset_model,
            "expert_parallel.preset_model and tensor_parallel.preset_model must match",
            f"{config.preset_model} and {tp_preset_model}",
        ),
    )
    for broken, what, got in rules:
        if broken:
            raise ValueError(explain(what, got=got))
    _check_mpu(mpu, tp_size)


def _check_values(config: Any) -> None:
    if not isinstance(config.validate_folding_routing, bool):
        raise ValueError(
            explain(
                "expert_parallel.validate_folding_routing must be a boolean",
                got=repr(config.validate_folding_routing),
                expected="true or false",
            )
        )
    if config.load_balance_coeff is not None:
        raise ValueError(_Section.refused_coefficient(config.load_balance_coeff))


def _check_sizes(config: Any, world: int, pp_size: int, tp_size: int, sp_size: int) -> None:
    if world % pp_size:
        raise ValueError(f"pp_size={pp_size} must divide world_size={world}")
    stage = world // pp_size
    if tp_size > 1 and sp_size > 1:
        raise ValueError(
            explain(
                "tensor and sequence parallelism are mutually exclusive with AutoEP",
                got=f"tp_size={tp_size} and sp_size={sp_size}",
            )
        )
    if tp_size > 1 and stage % tp_size:
        raise ValueError(
            f"tensor_parallel.autotp_size={tp_size} must divide the stage size {stage}. "
            f"Valid autotp_size values: {_divisors(stage)}"
        )
    if (etp := config.expert_tensor_parallel_size) != 1:
        raise ValueError(
            f"expert_parallel.expert_tensor_parallel_size={etp} is reserved for later; "
            "use expert_tensor_parallel_size=1"
        )
    if stage % config.autoep_size:
        raise ValueError(
            f"expert_parallel.autoep_size * expert_parallel.expert_tensor_parallel_size = {config.autoep_size} "
            f"must divide the stage size {stage}. Valid expert-width values: {_divisors(stage)}"
        )


def _check_mpu(mpu: Any, tp_size: int) -> None:
    for method in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        if callable(getattr(mpu, method, None)):
            theirs = getattr(mpu, method)()
            if theirs not in (1, tp_size):
                raise ValueError(
                    explain(
                        "the mpu tensor/model parallel world size is not that of tensor_parallel.autotp_size",
                        got=theirs,
                        expected=tp_size,
                    )
                )
            return


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def validate_autoep_post_detection(config: Any, specs: Sequence[MoELayerSpec]) -> None:
    """Check the settings against the layers that were found.

    Raises:
        ValueError: the experts of a layer cannot be shared by so many ranks, or it has fewer than a token uses.
    """
    for spec in specs:
        if config.autoep_size > spec.num_experts:
            raise ValueError(
                f"expert_parallel.autoep_size={config.autoep_size} exceeds num_experts={spec.num_experts} "
                f"of {spec.moe_module_name}"
            )
        if spec.num_experts % config.autoep_size:
            raise ValueError(
                f"expert_parallel.autoep_size={config.autoep_size} must divide num_experts={spec.num_experts} "
                f"of {spec.moe_module_name}. Valid values: {_divisors(spec.num_experts)}"
            )
        if spec.top_k > spec.num_experts:
            raise ValueError(
                f"top_k={spec.top_k} exceeds num_experts={spec.num_experts} of {spec.moe_module_name}"
            )
