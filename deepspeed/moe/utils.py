# SPDX-License-Identifier: Apache-2.0
"""Telling expert params from shared ones, in a model and in an optimizer's param groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import explain

# Numel at which a group of expert params is split: 2^29 / 3.
MAX_GROUP_SIZE = 178956971


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether `m` contains a MoE layer, and the number of experts of the first."""
    from .layer import MoE

    for module in m.modules():
        if isinstance(module, MoE):
            return True, module.num_experts
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Whether it belongs to an expert, so that other ranks may hold other values."""
    return not getattr(param, "allreduce", True)


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether the group was made for expert params."""
    return bool(param_group.get("moe", False))


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """`(shared, expert)`, each in the given order."""
    shared: list[nn.Parameter] = []
    expert: list[nn.Parameter] = []
    for param in params:
        (expert if is_moe_param(param) else shared).append(param)
    return shared, expert


def split_params_grads_into_shared_and_expert_params(
    group: Iterable[nn.Parameter],
) -> tuple[list[Tensor], list[Tensor]]:
    """`(shared, expert)` gradients in their params' dtype, without the params that have none."""
    shared, expert = split_params_into_shared_and_expert_params(group)
    return _grads(shared), _grads(expert)


def _grads(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [param.grad.to(param.dtype) for param in params if param.grad is not None]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
    max_group_size: int | float | None = MAX_GROUP_SIZE,
) -> list[dict[str, Any]]:
    """Move expert params into groups of their own, one for each expert-parallel group and input.

    The given groups lose their expert params; the new ones come last, with the same settings, the
    name of the expert-parallel group and `"moe": True`.

    Args:
        param_groups: one param group or several; those with expert params need a `name`.
        max_group_size: numel at which a group of expert params is split; None never splits.

    Returns:
        The given groups (the same objects), then the new ones.

    Raises:
        KeyError: a group with expert params has no `name`.
        TypeError: `param_groups` holds params instead of groups.
    """
    given = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    added: list[dict[str, Any]] = []
    for group in given:
        if not isinstance(group, dict):
            raise TypeError(
                explain(
                    "param groups are needed, to be split",
                    got=type(group).__name__,
                    expected='dicts such as {"params": [...], "name": "all"}',
                )
            )
        # the optimizer takes the given group afterwards: an iterator must not be used up here
        group["params"] = params = list(_as_params(group["params"]))
        shared, expert = split_params_into_shared_and_expert_params(params)
        if not expert:
            continue
        if "name" not in group:
            raise KeyError("name: a param group with expert params needs one")
        group["params"] = shared
        settings = {key: value for key, value in group.items() if key not in ("params", "name")}
        by_name: dict[str, list[nn.Parameter]] = {}
        for param in expert:
            by_name.setdefault(param.group_name, []).append(param)
        for name, members in by_name.items():
            for part in _parts(members, max_group_size):
                added.append({"params": part, "name": name, **settings, "moe": True})
    return given + added


def _as_params(params: Any) -> Iterable[nn.Parameter]:
    return [params] if torch.is_tensor(params) else params


def _parts(
    params: list[nn.Parameter], max_group_size: int | float | None
) -> Iterable[list[nn.Parameter]]:
    """Runs of params of at most `max_group_size` elements; a larger param is alone in its run."""
    part: list[nn.Parameter] = []
    size = 0
    for param in params:
        if part and max_group_size is not None and size + param.numel() > max_group_size:
            yield part
            part, size = [], 0
        part.append(param)
        size += param.numel()
    yield part


def configure_moe_param_groups(model_parameters: list[Any]) -> list[Any]:
    """Split params or param groups for an optimizer, if there are expert params among them.

    Args:
        model_parameters: params, or param groups.

    Returns:
        Param groups; the given list itself when it holds groups without expert params.

    Raises:
        AssertionError: `model_parameters` is no list.
    """
    if not isinstance(model_parameters, list):
        raise AssertionError("model_parameters must be a list")
    if all(isinstance(entry, dict) for entry in model_parameters):
        groups = model_parameters
        for number, group in enumerate(groups):
            group["params"] = list(_as_params(group["params"]))
            if any(is_moe_param(param) for param in group["params"]):
                group.setdefault("name", f"group-{number}")
        if not any(is_moe_param(param) for group in groups for param in group["params"]):
            return groups
    else:
        groups = [{"params": model_parameters, "name": "dense-params"}]
    return split_params_into_different_moe_groups_for_optimizer(groups)
