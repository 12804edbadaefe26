# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about a module: its weights, which names are frozen, shared or buffers, and its experts apart."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch

_EXPERT_KEY = re.compile(
    r"(?P<layer>.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(?P<expert>\d+)\.(?P<param>.+)"
)


def module_state(
    module: torch.nn.Module, exclude_frozen: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """`module.state_dict(**options)`, without parameters that do not require a gradient if so asked."""
    state = module.state_dict(**options)
    if exclude_frozen:
        prefix = options.get("prefix", "")
        for name, param in module.named_parameters(remove_duplicate=False):
            if not param.requires_grad:
                state.pop(prefix + name, None)
    return state


def buffer_names(module: torch.nn.Module) -> list[str]:
    """Names of the buffers that a state dict holds."""
    names = []
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def shared_names(module: torch.nn.Module) -> dict[str, str]:
    """Further names of parameters that occur more than once, each with the parameter's first name."""
    first: dict[torch.nn.Parameter, str] = {}
    shared = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        if param in first:
            shared[name] = first[param]
        else:
            first[param] = name
    return shared


def frozen_params(module: torch.nn.Module) -> OrderedDict[str, torch.nn.Parameter]:
    """Parameters that do not require a gradient, by name."""
    return OrderedDict((name, p) for name, p in module.named_parameters() if not p.requires_grad)


def moe_prefixes(module: torch.nn.Module) -> list[str]:
    """Names of the mixture-of-experts layers, in the order in which files number them."""
    return [
        name
        for name, child in module.named_modules()
        if hasattr(child, "deepspeed_moe") or getattr(child, "_is_autoep_layer", False)
    ]


def split_experts(
    state: Mapping[str, Any], prefixes: list[str], first_expert: Callable[[str], int]
) -> tuple[OrderedDict[str, Any], dict[tuple[int, int], OrderedDict[str, Any]]]:
    """Take the experts out of a module's state.

    Args:
        state: the module's state dict.
        prefixes: what `moe_prefixes` returned.
        first_expert: gives the global number of a layer's first local expert.

    Returns:
        The state without experts, and for each (layer, global expert) its part, keys with the global number.
    """
    rest: OrderedDict[str, Any] = OrderedDict()
    experts: dict[tuple[int, int], OrderedDict[str, Any]] = {}
    for key, value in state.items():
        match = _EXPERT_KEY.fullmatch(key)
        if match is None or match["layer"] not in prefixes:
            rest[key] = value
            continue
        expert = first_expert(match["layer"]) + int(match["expert"])
        part = experts.setdefault((prefixes.index(match["layer"]), expert), OrderedDict())
        part[_renumbered(match, expert)] = value
    return rest, experts


def local_expert_state(
    state: Mapping[str, Any], first_expert: Callable[[str], int]
) -> OrderedDict[str, Any]:
    """The state of an expert's file with local numbers in its keys."""
    return OrderedDict(
        (expert_renumbered(key, lambda layer: -first_expert(layer)), value)
        for key, value in state.items()
    )


def experts_here(
    state: Mapping[str, Any], own: Container[str], first_expert: Callable[[str], int]
) -> OrderedDict[str, Any]:
    """The state of a module with all experts, with local numbers in its keys and without experts that are not `own`."""
    found = OrderedDict()
    for name, value in state.items():
        local = expert_renumbered(name, lambda layer: -first_expert(layer))
        if local in own or not is_expert(name):
            found[local] = value
    return found


def expert_renumbered(name: str, shift: Callable[[str], int]) -> str:
    """A parameter's name with `shift(layer)` added to its expert's number, if it is an expert's."""
    match = _EXPERT_KEY.fullmatch(name)
    return (
        name if match is None else _renumbered(match, int(match["expert"]) + shift(match["layer"]))
    )


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to an expert of a mixture."""
    return _EXPERT_KEY.fullmatch(name) is not None


def experts_by_layer(names: Iterable[str]) -> dict[str, int]:
    """How many experts of each layer occur among names with local numbers."""
    found: dict[str, int] = {}
    for match in filter(None, map(_EXPERT_KEY.fullmatch, names)):
        found[match["layer"]] = max(found.get(match["layer"], 0), int(match["expert"]) + 1)
    return found


def _renumbered(match: re.Match[str], expert: int) -> str:
    return f"{match['layer']}.deepspeed_moe.experts.deepspeed_experts.{expert}.{match['param']}"
