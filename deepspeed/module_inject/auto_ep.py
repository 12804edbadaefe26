# SPDX-License-Identifier: Apache-2.0
"""AutoEP: finds a Hugging Face model's layers of experts, and puts layers in their place that spread the experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import nn

from deepspeed.moe.ep_repack import FUSED, LISTED, shape_of_source
from deepspeed.moe.fused_expert_layout import classify_fused_gate_up_layout
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import log_dist

from .auto_ep_capture import capture_target, collecting_modules, record_router_logits
from .auto_ep_config import MoELayerSpec, fill_autoep_config_from_hf
from .auto_ep_layer import AutoEPMoELayer
from .auto_ep_preset_adapters import PresetAdapter, get_preset_adapter
from .auto_ep_presets.base import MoEModelPreset
from .auto_ep_presets.registry import (
    PRESET_MODELS,
    preset_name_for_hf_model_type,
    unsupported_preset_for_hf_model_type,
)

CUSTOM = "custom"
_FUSED_NAMES = ("gate_up_proj", "down_proj")


class AutoEP:
    """Spreads the experts of one model.

    Args:
        model: the model; its `config` tells its type and its routing.
        config: the settings of section `expert_parallel`.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self.config = config.model_copy()  # it is filled in for this model
        self.hf_config = _text_config(model)

    @cached_property
    def _collecting(self) -> list[nn.Module]:
        return collecting_modules(self.model)  # once: there may be thousands of experts to pass by

    def ep_parser(self) -> list[MoELayerSpec]:
        """Describe all layers of experts.

        Raises:
            ValueError: the model is of no known family and the settings do not describe it; it has no such layers; or a
                layer is not as its family's are.
        """
        adapter = self._resolve_presets()[0]
        fill_autoep_config_from_hf(self.config, self.hf_config)
        pattern = re.compile(self.config.moe_layer_pattern or adapter.preset.moe_layer_pattern)
        specs = [
            self._spec(name, module, router, experts, adapter)
            for name, module in self.model.named_modules()
            if pattern.search(name) and not getattr(module, "_is_autoep_layer", False)
            for router, experts in _router_and_experts(module, self.config, adapter.preset)
        ]
        if not specs:
            raise ValueError(
                explain(
                    f"no layers of experts were found in {type(self.model).__name__}",
                    got=f"preset {adapter.preset.name}, names {pattern.pattern!r}",
                    expected=f"modules with children {adapter.preset.router_name!r} and {adapter.preset.experts_name!r}",
                    fix="set expert_parallel.preset_model, or moe_layer_pattern, router_pattern and expert_pattern",
                )
            )
        log_dist(f"AutoEP found {len(specs)} layers of experts ({adapter.preset.name})", [0])
        return specs

    def _resolve_presets(self) -> list[PresetAdapter]:
        """The preset that the settings name, or that the model's type asks for.

        Raises:
            ValueError: none does, or the model's type is refused by name.
        """
        if self.config.preset_model is not None:
            if self.config.preset_model not in PRESET_MODELS:
                raise ValueError(
                    explain(
                        "unknown expert_parallel.preset_model",
                        got=self.config.preset_model,
                        expected=", ".join(PRESET_MODELS),
                    )
                )
            return [get_preset_adapter(self.config.preset_model)]
        model_type = getattr(self.hf_config, "model_type", None)
        refused = unsupported_preset_for_hf_model_type(model_type)
        if refused is not None:
            note = refused[1].unsupported_hf_model_type_notes[model_type]
            raise ValueError(f"AutoEP does not serve models of the type {model_type}: {note}")
        name = preset_name_for_hf_model_type(model_type)
        if name is not None:
            return [get_preset_adapter(name)]
        if self.config.moe_layer_pattern is None:
            raise ValueError(
                explain(
                    "the model's family is not known to AutoEP",
                    got=f"config.model_type {model_type!r}",
                    expected=", ".join(t for p in PRESET_MODELS.values() for t in p.hf_model_types),
                    fix="set expert_parallel.preset_model, or describe the layers by moe_layer_pattern",
                )
            )
        return [PresetAdapter(MoEModelPreset(CUSTOM, ()))]

    def _spec(
        self, name: str, layer: nn.Module, router: str, experts: str, adapter: PresetAdapter
    ) -> MoELayerSpec:
        config, preset = self.config, adapter.preset
        stored = _storage(name, getattr(layer, experts), config, preset)
        gate = getattr(layer, router)
        _check_router(name, gate, preset, stored)
        _check_count(name, stored["num_experts"], config.num_experts_attr, self.hf_config)
        shared, shared_gate = _shared(layer, config, preset)
        target, index, layer_name = capture_target(self._collecting, layer, gate)
        chosen = config.score_func
        score_func = preset.score_func if chosen == "auto" else chosen
        norm = adapter.route_norm(self.hf_config)
        return MoELayerSpec(
            moe_module_name=name,
            model_family=preset.name,
            router_name=router,
            experts_name=experts,
            **stored,
            top_k=self._top_k(name, layer, preset),
            score_func=score_func,
            score_apply="post" if config.score_apply == "auto" else config.score_apply,
            route_norm=norm if config.route_norm is None else config.route_norm,
            gate_bias=getattr(gate, "bias", None) is not None,
            return_router_logits=(target == "moe_block" and index == 1)
            or (adapter.is_old and target == "none" and _returns_logits(self.hf_config, layer)),
            router_logits_capture_target=target,
            router_logits_capture_index=index,
            router_logits_capture_layer_name=layer_name,
            has_shared_experts=bool(shared),
            shared_experts_name=shared,
            shared_experts_gate_name=shared_gate,
            route_scale=_resolve_route_scale(config, self.hf_config),
            num_expert_groups=config.num_expert_groups,
            num_limited_groups=config.num_limited_groups,
            supports_expert_bias=preset.supports_expert_bias,
            logits_in_fp32=preset.logits_in_fp32,
            scores_in_logits_dtype=adapter.scores_in_logits_dtype,
            masked_score=adapter.masked_score,
            unsupported_router_bias_names=preset.unsupported_router_bias_names,
        )

    def _top_k(self, name: str, layer: nn.Module, preset: MoEModelPreset) -> int:
        if self.config.top_k != "auto":
            return int(self.config.top_k)
        given = self.config.top_k_attr
        for attribute in (given,) if given else preset.top_k_attrs:
            found = getattr(self.hf_config, attribute, None)
            if isinstance(found, int):
                return found
        raise ValueError(
            explain(
                f"how many experts a token of {name} uses is not told",
                got=f"no {given or ', '.join(preset.top_k_attrs)} in the model's configuration",
                fix="set expert_parallel.top_k or top_k_attr",
            )
        )

    def replace_moe_layer(self, spec: MoELayerSpec, ep_size: int, ep_rank: int) -> AutoEPMoELayer:
        """Put a layer that holds this rank's share of the experts in the place of the model's own.

        Args:
            spec: the layer, as `ep_parser` described it.
            ep_size: ranks that share its experts.
            ep_rank: this rank's place among them.
        """
        parent_name, _, child = spec.moe_module_name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        source = getattr(parent, child)
        made = AutoEPMoELayer(
            spec, source, ep_size=ep_size, ep_rank=ep_rank, config=self.config
        ).train(source.training)
        setattr(parent, child, made)
        record_router_logits(self._collecting, spec, source, made)
        return made


def _resolve_route_scale(config: Any, hf_config: Any) -> float:
    """The factor on scores: `routed_scaling_factor` where it is a number, else `route_scale`, else the model's.

    Raises:
        ValueError: a factor that is no finite number.
    """
    factor = config.routed_scaling_factor
    if factor == "auto":
        theirs = getattr(hf_config, "routed_scaling_factor", None)
        own = "route_scale" in config.model_fields_set or theirs is None
        return float(config.route_scale if own else theirs)
    if (
        isinstance(factor, bool)
        or not isinstance(factor, (int, float))
        or not math.isfinite(factor)
    ):
        raise ValueError(
            explain(
                "expert_parallel.routed_scaling_factor must be a finite number or 'auto'",
                got=repr(factor),
            )
        )
    return float(factor)


def _returns_logits(hf_config: Any, layer: nn.Module) -> bool:
    """Whether a layer of transformers 4, whose outputs nothing collects, hands logits up itself.

    Qwen2-MoE's decoder counts on it in all of 4, those of Mixtral and Qwen3-MoE in its earlier versions.
    """
    family = getattr(hf_config, "model_type", None)
    theirs = type(layer).__module__.startswith("transformers.")
    return family == "qwen2_moe" or (theirs and family in ("mixtral", "qwen3_moe"))


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    # a model of several kinds of input may be refused by its own type, so that is looked at first
    own = getattr(config, "model_type", None)
    if text is None or unsupported_preset_for_hf_model_type(own) is not None:
        return config
    return text


def _router_and_experts(
    module: nn.Module, config: Any, preset: MoEModelPreset
) -> Iterator[tuple[str, str]]:
    """Names of a layer's router and experts, where it has both (layers without experts may bear like names)."""
    children = dict(module.named_children())

    def find(pattern: str | None, name: str) -> str | None:
        if pattern is None:
            return name if name in children else None
        return next((child for child in children if re.fullmatch(pattern, child)), None)

    router = find(config.router_pattern, preset.router_name)
    experts = find(config.expert_pattern, preset.experts_name)
    if router is not None and experts is not None:
        yield router, experts


def _storage(name: str, experts: nn.Module, config: Any, preset: MoEModelPreset) -> dict[str, Any]:
    """How a layer's experts are stored, and their sizes.

    Raises:
        ValueError: in no known way.
    """
    given = (config.expert_w1, config.expert_w2)
    fused = (given[0] or _FUSED_NAMES[0], given[1] or _FUSED_NAMES[1])
    own = {key for key, _ in experts.named_parameters(recurse=False)}
    w3 = config.expert_w3 if isinstance(config.expert_w3, str) else None
    if set(fused) <= own:
        _refuse_others(name, own - {*fused, w3})
        gate, down = (shape_of_source(getattr(experts, key)) for key in fused)
        if w3 is not None:
            sizes = (gate[2], gate[1])
        else:
            layout = classify_fused_gate_up_layout(gate, down)
            if layout is None:
                raise _unknown(name, f"{fused[0]} {tuple(gate)} and {fused[1]} {tuple(down)}")
            sizes = (layout.hidden_size, layout.ffn_hidden_size)
        return _stored(FUSED, *fused, w3, gate[0], sizes)
    listed = list(experts.children())
    choices = preset.listed_names
    if all(given) and w3 is not None:
        choices = ((given[0], given[1], w3),)
    for names in choices:
        if listed and all(isinstance(getattr(listed[0], key, None), nn.Linear) for key in names):
            _refuse_others(
                name,
                {k for k, _ in listed[0].named_parameters()} - {f"{key}.weight" for key in names},
            )
            rows, columns = shape_of_source(getattr(listed[0], names[0]).weight)
            return _stored(LISTED, *names, len(listed), (columns, rows))
    raise _unknown(name, ", ".join(sorted(own)) or f"{len(listed)} modules")


def _stored(
    kind: str, w1: str, w2: str, w3: str | None, experts: int, sizes: tuple[int, int]
) -> dict[str, Any]:
    return {
        "expert_storage": kind,
        "expert_w1_name": w1,
        "expert_w2_name": w2,
        "expert_w3_name": w3,
        "num_experts": experts,
        "hidden_size": sizes[0],
        "ffn_hidden_size": sizes[1],
    }


def _refuse_others(name: str, others: set[Any]) -> None:
    if others:
        raise ValueError(
            explain(
                f"the experts of {name} have weights that AutoEP does not know",
                got=", ".join(sorted(map(str, others))),
                expected="a gate, an up and a down weight, without biases",
            )
        )


def _unknown(name: str, got: str) -> ValueError:
    return ValueError(
        explain(
            f"the experts of {name} are stored in no known way",
            got=got,
            expected="stacked weights [experts, 2 ffn, hidden] and [experts, hidden, ffn], or modules of three linear "
            "layers",
            fix="name the weights by expert_parallel.expert_w1, expert_w2 and expert_w3",
        )
    )


def _check_router(name: str, router: nn.Module, preset: MoEModelPreset, stored: Any) -> None:
    weight = getattr(router, "weight", None)
    wanted = (stored["num_experts"], stored["hidden_size"])
    if weight is None or tuple(shape_of_source(weight)) != wanted:
        got = "no weight" if weight is None else tuple(shape_of_source(weight))
        raise ValueError(
            explain(f"the router of {name} is of another size", got=got, expected=wanted)
        )
    for bias in preset.unsupported_router_bias_names:
        if getattr(router, bias, None) is not None:
            raise ValueError(
                explain(f"the router of {name} has a bias that its family has not", got=bias)
            )


def _check_count(name: str, found: int, attribute: str | None, hf_config: Any) -> None:
    told = found if attribute is None else getattr(hf_config, attribute, None)
    if told != found:
        raise ValueError(
            explain(
                f"{name} has another number of experts than its model's configuration says",
                got=found,
                expected=f"{told}, which is {attribute}",
                fix="correct or remove expert_parallel.num_experts_attr",
            )
        )


def _shared(layer: nn.Module, config: Any, preset: MoEModelPreset) -> tuple[str, str]:
    """Attributes of the experts that see all tokens, and of their gate; empty where there are none."""
    if config.has_shared_experts is False:
        return "", ""
    shared = config.shared_experts_pattern or preset.shared_experts_name
    gate = config.shared_experts_gate_pattern or preset.shared_experts_gate_name
    children = dict(layer.named_children())
    shared = shared if shared in children else ""
    if config.has_shared_experts and not shared:
        raise ValueError(
            explain(
                "there are no shared experts where expert_parallel.has_shared_experts wants them",
                got=", ".join(children),
                fix="name them by expert_parallel.shared_experts_pattern",
            )
        )
    return shared, gate if shared and gate in children else ""
