# SPDX-License-Identifier: Apache-2.0
"""A sharded optimizer's state as plain containers, and back from any saved form.

Writing gives the layout of the contract: one flat master and one flat tensor of each inner state a group, cut by rank.
Reading goes through `SavedState`, parameter by parameter, so that the number of ranks, the stage, the order of
parameters and the split over memory tiers may all differ from those of the run that saved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.checkpoint.format import SCALER_FIELDS, Zero
from deepspeed.checkpoint.reshard import FP32, SavedState, from_inline, from_shards
from deepspeed.checkpoint.writer import attributes, plain
from deepspeed.git_version_info import version
from deepspeed.utils.errors import DeepSpeedCheckpointError, explain

from .diagnose import some_of
from .own_slice import numel_of, shape_of

if TYPE_CHECKING:
    from .optimizer import ZeroOptimizer
    from .shard_group import ShardGroup, ShardPart

_MODEL_OPTIONS = frozenset({"exp_avg_mask"})
_EXECUTION_OPTIONS = _MODEL_OPTIONS | {"params", "foreach", "fused", "capturable", "differentiable"}
"""Param group entries that say how a machine computes, or what its model is: a load leaves them as the run has them."""

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a loss scaler has learnt; its other attributes are the configuration's."""


# - saving


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
        families = {getattr(p, "ds_zero_placement_family", "replicated") for p in params}
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


# - loading


def load_state_dict(
    optimizer: ZeroOptimizer,
    saved: SavedState | Mapping[str, Any] | Sequence[Mapping[str, Any] | None],
    load_optimizer_states: bool = True,
    load_from_fp32_weights: bool = True,
    **_: Any,
) -> None:
    """Take over a saved state: masters, inner states, options of the param groups, loss scale.

    Args:
        optimizer: receives; its param group dicts stay the same objects.
        saved: a `SavedState`, what `state_dict` returned on this rank, or the list of what it returned on all ranks.
        load_optimizer_states: take inner states, options and loss scale.
        load_from_fp32_weights: take the masters; otherwise they are rebuilt from the model's weights.

    Raises:
        DeepSpeedCheckpointError: parameters are missing from the saved state or have other sizes.
    """
    if not isinstance(saved, SavedState):
        saved = _as_saved_state(optimizer, saved)
    _check_fits(optimizer, saved)
    if not load_from_fp32_weights or not saved.has_masters:
        optimizer.refresh_fp32_params()
    for group in optimizer.groups:
        keys = _state_keys(optimizer, group, saved) if load_optimizer_states else []
        if load_optimizer_states:
            _start_states(optimizer, group, saved, keys)
        _copy_runs(optimizer, group, saved, keys, masters=load_from_fp32_weights)
    if load_optimizer_states:
        _load_options(optimizer, saved)
        _load_scaler(optimizer, saved)
        optimizer.overflow = False


def open_needed(optimizer: ZeroOptimizer, saved: SavedState) -> None:
    """Check that a saved state fits, and open the shards that this rank copies from (so that it fails early)."""
    _check_fits(optimizer, saved)
    for group in optimizer.groups:
        _first_slot(optimizer, group, saved)
        for segment in group.layout.segments(group.shard_axis.rank):
            name = optimizer.param_names[group.params[segment.param]]
            for _ in saved.runs(name, segment.param_start, segment.length):
                pass


def _as_saved_state(optimizer: ZeroOptimizer, saved: Any) -> SavedState:
    shapes = param_shapes(optimizer)
    if isinstance(saved, Mapping) and (Zero.WRAPPER_FLAT in saved or Zero.WRAPPER_LISTS in saved):
        sizes = {name: shape for group in shapes for name, shape in group.items()}
        return from_inline(saved, [list(group) for group in shapes], sizes)
    if isinstance(saved, Mapping):
        return from_shards(lambda rank: saved, shapes)
    given = list(saved)
    return from_shards(lambda rank: given[rank] or next(filter(None, given)), shapes)


def _check_fits(optimizer: ZeroOptimizer, saved: SavedState) -> None:
    missing, resized = [], []
    for group in optimizer.groups:
        for param in group.params:
            name = optimizer.param_names[param]
            if name not in saved.pieces:
                missing.append(name)
            elif saved.numel(name) not in (numel_of(param), 0):
                resized.append(
                    f"{name} ({saved.numel(name)} elements saved, {numel_of(param)} here)"
                )
    for names, what in ((missing, "does not hold"), (resized, "holds in another size")):
        if names:
            raise DeepSpeedCheckpointError(
                explain(
                    f"the saved optimizer {what} parameters that this run trains",
                    got=some_of(names),
                    fix="Load into the model and the optimizer groups that were saved, or pass "
                    "load_optimizer_states=False.",
                )
            )


def _state_keys(optimizer: ZeroOptimizer, group: ShardGroup, saved: SavedState) -> list[str]:
    """Element-wise states that were saved for a group."""
    slot = _first_slot(optimizer, group, saved)
    return [] if slot is None else [key for key in slot.tensors if key != FP32]


def _first_slot(optimizer: ZeroOptimizer, group: ShardGroup, saved: SavedState) -> Any:
    """A slot with states of a group, of a shard that this rank opens anyway if there is one."""
    for segment in group.layout.segments(group.shard_axis.rank):
        name = optimizer.param_names[group.params[segment.param]]
        for _, slot, _, _ in saved.runs(name, segment.param_start, segment.length):
            return slot
    slots = (saved.first_slot(optimizer.param_names[param]) for param in group.params)
    return next((slot for slot in slots if slot is not None), None)


def _start_states(
    optimizer: ZeroOptimizer, group: ShardGroup, saved: SavedState, keys: Iterable[str]
) -> None:
    """Make the inner states of a group's parts, zero, with the saved numbers in place."""
    inner = optimizer.optimizer
    slot = _first_slot(optimizer, group, saved)
    prepare = (
        getattr(inner, "_init_state", None)
        if type(inner).__module__.startswith("deepspeed.")
        else None
    )
    for part in group.parts:
        old = inner.state.pop(part.master, {})
        if slot is None or not (slot.numbers or len(slot.tensors) > 1):
            continue
        state = inner.state[part.master]
        kept = _in_use(old, keys, part)
        if prepare is not None:
            prepare(part.master.new_empty(0), state)  # for the names and dtypes alone
            made = {key: v.dtype for key, v in state.items() if isinstance(v, torch.Tensor)}
            if any(key not in kept or kept[key].dtype != dtype for key, dtype in made.items()):
                kept = {}
                state.clear()
                prepare(part.master, state)
        state.update(kept)
        for key in keys:
            like = state.get(key, old.get(key))
            dtype = like.dtype if isinstance(like, torch.Tensor) else slot.tensors[key].dtype
            if key not in state:
                state[key] = torch.zeros(part.length, dtype=dtype, device=part.master.device)
        options = optimizer.param_groups[group.param_group_index]
        for key, value in slot.numbers.items():
            state[key] = _number(
                value, inner, options, part, counted=isinstance(state.get(key), int)
            )


def _in_use(
    old: Mapping[str, Any], keys: Iterable[str], part: ShardPart
) -> dict[str, torch.Tensor]:
    """The states of before that can be filled again: new memory costs more time than what is read into it."""
    return {
        key: value
        for key in keys
        if isinstance(value := old.get(key), torch.Tensor)
        and value.shape == part.master.shape
        and value.device == part.master.device
    }


def _number(
    value: Any,
    inner: torch.optim.Optimizer,
    options: Mapping[str, Any],
    part: ShardPart,
    counted: bool,
) -> Any:
    """A one-value state in the type that the optimizer keeps it in (torch's own count steps in a tensor)."""
    is_number = isinstance(value, (int, float)) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )
    if is_number and counted:
        return int(value)
    if is_number and type(inner).__module__.startswith("torch.optim"):
        on_device = options.get("capturable") or options.get("fused")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float32
        return torch.tensor(
            float(value), dtype=dtype, device=part.master.device if on_device else "cpu"
        )
    return value.clone() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def _copy_runs(
    optimizer: ZeroOptimizer,
    group: ShardGroup,
    saved: SavedState,
    keys: Sequence[str],
    masters: bool,
) -> None:
    """Copy what this rank owns of a group, run by run."""
    state = optimizer.optimizer.state
    filled = {(id(part), key): 0 for part in group.parts for key in keys}
    for segment in group.layout.segments(group.shard_axis.rank):
        name = optimizer.param_names[group.params[segment.param]]
        for part, offset, within, length in group.runs(segment.shard_start, segment.length):
            targets = {key: state[part.master][key] for key in keys}
            if masters:
                targets[FP32] = part.master.data
            for shift, slot, start, run in saved.runs(name, segment.param_start + offset, length):
                for key, target in targets.items():
                    if key not in slot.tensors:
                        continue
                    flat, begin = target.view(-1), within + shift
                    flat.narrow(0, begin, run).copy_(slot.tensors[key].narrow(0, start, run))
                    if key in keys:  # what nobody saved, padding for one, is zero
                        done = filled[id(part), key]
                        flat[done:begin].zero_()
                        filled[id(part), key] = begin + run
    for part in group.parts:
        for key in keys:
            if key in state.get(part.master, {}):
                state[part.master][key].view(-1)[filled[id(part), key] :].zero_()


def _load_options(optimizer: ZeroOptimizer, saved: SavedState) -> None:
    """Update the param groups in place: schedulers and callers hold on to these very dicts."""
    for group in optimizer.groups:
        options = saved.hyper.get(optimizer.param_names[group.params[0]], {})
        current = optimizer.param_groups[group.param_group_index]
        current.update(
            (key, value) for key, value in options.items() if key not in _EXECUTION_OPTIONS
        )


def _load_scaler(optimizer: ZeroOptimizer, saved: SavedState) -> None:
    if optimizer.loss_scaler.dynamic and saved.scaler.get("dynamic"):
        learnt = {key: saved.scaler[key] for key in _SCALER_STATE if key in saved.scaler}
        optimizer.loss_scaler.load_state_dict(learnt)


def load_plain(
    optimizer: torch.optim.Optimizer, saved: SavedState, names: Sequence[Sequence[str]]
) -> None:
    """Give a plain torch optimizer the states of its parameters, whatever form they were saved in.

    Args:
        optimizer: an optimizer over module parameters; its param group dicts stay the same objects.
        saved: the saved state.
        names: parameter names of each of its groups, in order.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    flat_names = [name for group in names for name in group]
    states: dict[int, dict[str, Any]] = {}
    for index, (param, name) in enumerate(zip(params, flat_names, strict=True)):
        slot = saved.first_slot(name) if name in saved.pieces else None
        if slot is None:
            continue
        values = {key: saved.full(name, key) for key in slot.tensors if key != FP32}
        state = {key: value.view(param.shape) for key, value in values.items() if value is not None}
        state |= {key: _plain_number(value, optimizer) for key, value in slot.numbers.items()}
        if state:
            states[index] = state
    groups, first = [], 0
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        options = saved.hyper.get(group_names[0], {}) if group_names else {}
        kept = {key: value for key, value in group.items() if key != "params"}
        kept.update((key, value) for key, value in options.items() if key not in _EXECUTION_OPTIONS)
        groups.append({**kept, "params": list(range(first, first + len(group_names)))})
        first += len(group_names)
    load_in_place(optimizer, {"state": states, "param_groups": groups})


def _plain_number(value: Any, optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(value, int) and type(optimizer).__module__.startswith("torch.optim"):
        return torch.tensor(float(value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def load_in_place(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, but with the param group dicts that were there before, updated."""
    before, listed = list(optimizer.param_groups), optimizer.param_groups
    optimizer.load_state_dict(dict(saved))
    for old, new in zip(before, optimizer.param_groups, strict=True):
        kept = {key: old[key] for key in ("params", *_MODEL_OPTIONS) if key in old}
        old.clear()
        old.update((key, value) for key, value in new.items() if key not in _MODEL_OPTIONS)
        old.update(kept)
    listed[:] = before
    optimizer.param_groups = listed
