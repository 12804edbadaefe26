# SPDX-License-Identifier: Apache-2.0
"""A sharded optimizer's state as plain containers, in the layout of the contract.

One flat master and one flat tensor of each inner state a group, cut by rank. The way back is `load_state`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.checkpoint.format import SCALER_FIELDS, Zero
from deepspeed.checkpoint.writer import attributes, plain
from deepspeed.git_version_info import version

from .own_slice import shape_of

if TYPE_CHECKING:
    from .optimizer import ZeroOptimizer
    from .shard_group import ShardGroup


def state_dict(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """This rank's part of the optimizer's state, in plain containers; tensors are views of the live ones."""
    if optimizer.plan.stage == 0:
        return _wrapper_state(optimizer)
    if optimizer.plan.stage == 3:
        return _sliced_state(optimizer)
    keep_padding = getattr(optimizer, "saves_padding", False)
    groups = optimizer.groups
    masters = flat_masters(optimizer)
    if not keep_padding:
        masters = [
            flat[: flat.numel() - group.padding]
            for flat, group in zip(masters, groups, strict=True)
        ]
    return {
        Zero.LOSS_SCALER_STATE: _scaler_state(optimizer),
        Zero.DYNAMIC_LOSS_SCALE: bool(optimizer.dynamic_loss_scale),
        Zero.OVERFLOW: bool(optimizer.overflow),
        Zero.CLIP_GRAD: float(optimizer.clip_grad),
        Zero.BASE_STATE: _inner_state(optimizer),
        Zero.FP32_GROUPS: masters,
        Zero.STAGE: int(optimizer.plan.stage),
        Zero.GROUP_PADDINGS: [group.padding for group in groups],
        Zero.PARTITION_COUNT: [group.shard_axis.size for group in groups],
        Zero.SLICE_MAPPINGS: [_slices(optimizer, group) for group in groups],
        "ds_version": version,
    }


def _sliced_state(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """The form of stage 3: a flat tensor of slices a group, padding included."""
    return {
        Zero.LOSS_SCALER_STATE: _scaler_state(optimizer),
        Zero.DYNAMIC_LOSS_SCALE: bool(optimizer.dynamic_loss_scale),
        Zero.OVERFLOW: bool(optimizer.overflow),
        Zero.STAGE: 3,
        Zero.PARTITION_COUNT: optimizer.groups[0].shard_axis.size,
        Zero.INNER: _inner_state(optimizer),
        Zero.FP32_FLAT_GROUPS: flat_masters(optimizer),
        "ds_version": version,
        **_partition_groups(optimizer),
    }


def _partition_groups(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """Over which ranks each group's parameters are cut, where some belong to experts that AutoEP spread."""
    if not any(hasattr(p, "ds_zero_placement_family") for g in optimizer.groups for p in g.params):
        return {}
    found = []
    for number, group in enumerate(optimizer.groups):
        axis, params = group.shard_axis, group.params
        families = {getattr(p, "ds_zero_placement_family", Zero.REPLICATED_FAMILY) for p in params}
        group_names = {getattr(p, "ds_zero_partition_group_name", None) for p in params} - {None}
        found.append(
            {
                "sub_group": number,
                "partition_count": axis.size,
                "partition_rank": axis.rank,
                "partition_ranks": list(axis.ranks),
                "families": sorted(families),
                "group_names": sorted(group_names),
            }
        )
    return {Zero.PARTITION_GROUPS: found}


def param_shapes(optimizer: ZeroOptimizer) -> list[OrderedDict[str, torch.Size]]:
    """Names and shapes of each group's parameters, in flat order."""
    return [
        OrderedDict((optimizer.param_names[p], shape_of(p)) for p in group.params)
        for group in optimizer.groups
    ]


def _wrapper_state(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """The inline form of stage 0, flat or by parameter as the wrapper's class has it."""
    scaler = optimizer.loss_scaler
    saved: dict[str, Any] = {
        Zero.DYNAMIC_LOSS_SCALE: bool(optimizer.dynamic_loss_scale),
        "cur_scale": float(optimizer.loss_scale),
        "cur_iter": int(getattr(scaler, "cur_iter", 0)),
        Zero.CLIP_GRAD: float(optimizer.clip_grad),
        Zero.WRAPPER_NAMES: [list(group) for group in param_shapes(optimizer)],
    }
    if scaler.dynamic:
        names = ("last_overflow_iter", "scale_factor", "scale_window")
        saved.update((name, getattr(scaler, name)) for name in names)
    saved[Zero.LOSS_SCALER_STATE] = _scaler_state(optimizer)
    if getattr(optimizer, "saves_flat", False):
        saved[Zero.INNER] = _inner_state(optimizer)
        saved[Zero.WRAPPER_FLAT] = flat_masters(optimizer)
    else:
        saved[Zero.INNER] = _inner_state_by_param(optimizer)
        saved[Zero.WRAPPER_LISTS] = masters_by_param(optimizer)
    return saved


def flat_masters(optimizer: ZeroOptimizer) -> list[torch.Tensor]:
    """The masters of this rank, one flat tensor a group."""
    return [_joined([part.master for part in group.parts]) for group in optimizer.groups]


def masters_by_param(optimizer: ZeroOptimizer) -> list[list[torch.Tensor]]:
    """The masters of each group's parameters, in their shapes; for shards of one rank."""
    masters = flat_masters(optimizer)
    return [_split(group, flat) for group, flat in zip(optimizer.groups, masters, strict=True)]


def _scaler_state(optimizer: ZeroOptimizer) -> dict[str, Any]:
    scaler = optimizer.loss_scaler
    return {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parts as one flat tensor: the only one itself, or a copy in host memory."""
    if len(parts) == 1:
        return parts[0].detach()
    return torch.cat([part.detach().cpu() for part in parts])


def _split(group: ShardGroup, flat: torch.Tensor) -> list[torch.Tensor]:
    layout = group.layout
    return [
        flat.narrow(0, start, numel).view(param.shape)
        for start, numel, param in zip(layout.starts, layout.numels, group.params, strict=True)
    ]


def _group_state(optimizer: ZeroOptimizer, group: ShardGroup) -> dict[str, Any]:
    """The inner optimizer's state of a whole shard."""
    states = [optimizer.optimizer.state.get(part.master) or {} for part in group.parts]
    if not all(states):
        return {}
    saved = {}
    for key, value in states[0].items():
        values = [state[key] for state in states]
        saved[key] = (
            _joined(values) if _is_element_wise(value, group.parts[0].length) else plain(value)
        )
    return saved


def _is_element_wise(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() == length


def _inner_state(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """A torch state dict over one flat parameter a group."""
    states = {i: _group_state(optimizer, group) for i, group in enumerate(optimizer.groups)}
    units = [
        [i for i, group in enumerate(optimizer.groups) if group.param_group_index == number]
        for number in range(len(optimizer.param_groups))
    ]
    return {
        "state": {i: state for i, state in states.items() if state},
        "param_groups": _saved_param_groups(optimizer, units),
    }


def _inner_state_by_param(optimizer: ZeroOptimizer) -> dict[str, Any]:
    """A torch state dict over the single parameters."""
    states: dict[int, Any] = {}
    units: list[list[int]] = [[] for _ in optimizer.param_groups]
    for group in optimizer.groups:
        first = sum(map(len, units))
        units[group.param_group_index] += range(first, first + len(group.params))
        whole = _group_state(optimizer, group)
        length = group.layout.shard_numel
        pieces = {
            key: _split(group, value) if _is_element_wise(value, length) else value
            for key, value in whole.items()
        }
        if whole:
            for i in range(len(group.params)):
                states[first + i] = {
                    key: value[i] if isinstance(value, list) else value
                    for key, value in pieces.items()
                }
    return {"state": states, "param_groups": _saved_param_groups(optimizer, units)}


def _saved_param_groups(
    optimizer: ZeroOptimizer, units: Sequence[list[int]]
) -> list[dict[str, Any]]:
    return [
        {
            **{key: plain(value) for key, value in group.items() if key != "params"},
            "params": indices,
        }
        for group, indices in zip(optimizer.param_groups, units, strict=True)
    ]


def _slices(optimizer: ZeroOptimizer, group: ShardGroup) -> OrderedDict[str, Any]:
    """Where this rank's part of each parameter lies in its shard."""
    return OrderedDict(
        (
            optimizer.param_names[group.params[segment.param]],
            attributes(numel=segment.length, start=segment.shard_start),
        )
        for segment in group.layout.segments(group.shard_axis.rank)
    )
