# SPDX-License-Identifier: Apache-2.0
"""A sharded optimizer's state, back from any saved form.

It goes through `SavedState`, parameter by parameter, so that the number of ranks, the stage, the order of parameters and
the split over memory tiers may all differ from those of the run that saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.checkpoint.format import Zero
from deepspeed.checkpoint.reshard import FP32, SavedState, from_inline, from_shards
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.utils.errors import DeepSpeedCheckpointError, explain

from .diagnose import some_of
from .own_slice import numel_of
from .state import param_shapes
from .step_order import KEPT

if TYPE_CHECKING:
    from .optimizer import ZeroOptimizer
    from .shard_group import ShardGroup, ShardPart

_MODEL_OPTIONS = frozenset({"exp_avg_mask"})
_EXECUTION_OPTIONS = _MODEL_OPTIONS | {"params", "foreach", "fused", "capturable", "differentiable"}
"""Param group entries that say how a machine computes, or what its model is: a load leaves them as the run has them."""

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a loss scaler has learnt; its other attributes are the configuration's."""


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
    saved = _in_words_of(optimizer.optimizer, saved)
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


def _in_words_of(inner: torch.optim.Optimizer, saved: SavedState) -> SavedState:
    """What torch's Adagrad calls ``sum``, the one for the host's memory calls ``exp_avg_sq``."""
    if isinstance(inner, torch.optim.Adagrad):
        return saved.with_states_named({"exp_avg_sq": "sum"})
    if isinstance(inner, DeepSpeedCPUAdagrad):
        return saved.with_states_named({"sum": "exp_avg_sq"})
    return saved


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
    return [] if slot is None else [k for k in slot.tensors if k != FP32 and _reads(optimizer, k)]


def _reads(optimizer: ZeroOptimizer, key: str) -> bool:
    """Whether a saved state is for this run: some are for the order of the step that wrote them."""
    return optimizer.order.keeps_more or not key.startswith(KEPT)


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
            (key, value)
            for key, value in options.items()
            if key not in _EXECUTION_OPTIONS and _reads(optimizer, key)
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
    saved = _in_words_of(optimizer, saved)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    flat_names = [name for group in names for name in group]
    states: dict[int, dict[str, Any]] = {}
    for index, (param, name) in enumerate(zip(params, flat_names, strict=True)):
        slot = saved.first_slot(name) if name in saved.pieces else None
        if slot is None:
            continue
        keys = [key for key in slot.tensors if key != FP32 and not key.startswith(KEPT)]
        values = {key: saved.full(name, key) for key in keys}
        state = {key: value.view(param.shape) for key, value in values.items() if value is not None}
        state |= {key: _plain_number(value, optimizer) for key, value in slot.numbers.items()}
        if state:
            states[index] = state
    groups, first = [], 0
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        options = saved.hyper.get(group_names[0], {}) if group_names else {}
        kept = {key: value for key, value in group.items() if key != "params"}
        kept.update(
            (key, value)
            for key, value in options.items()
            if key not in _EXECUTION_OPTIONS and not key.startswith(KEPT)
        )
        groups.append({**kept, "params": list(range(first, first + len(group_names)))})
        first += len(group_names)
    load_in_place(optimizer, {"state": states, "param_groups": groups})


def _plain_number(value: Any, optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(value, int) and type(optimizer).__module__.startswith("torch.optim"):
        return torch.tensor(float(value), device="cpu")
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
