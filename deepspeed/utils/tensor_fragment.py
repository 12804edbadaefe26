# SPDX-License-Identifier: Apache-2.0
"""Looking at and changing the full-precision state of one parameter, wherever its pieces live.

A sharded parameter's master weight, gradient and optimizer states lie in the shards of several ranks. These functions
are collective over those ranks: every rank calls them, in the same order of parameters, and sees the whole tensor.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..comm import flat
from .errors import explain


@dataclass
class fragment_address:
    """A run of a flat tensor."""

    numel: int
    start: int


@dataclass
class tensor_fragment:
    """This rank's part of one parameter.

    Attributes:
        lp_fragment: that part of the parameter itself, flat.
        lp_fragment_address: where it lies in the parameter.
        hp_fragment: the same elements of the master weights, flat (the first run where memory tiers cut it).
        hp_fragment_address: where they lie in this rank's shard.
        param_group_index: the group of the optimizer.
    """

    lp_fragment: torch.Tensor
    lp_fragment_address: fragment_address
    hp_fragment: torch.Tensor
    hp_fragment_address: fragment_address
    param_group_index: int

    def update_hp(self) -> None:
        """Copy the parameter's values to the master weights."""
        self.hp_fragment.data.copy_(self.lp_fragment.data[: self.hp_fragment.numel()])

    def update_lp(self) -> None:
        """Copy the master weights to the parameter."""
        self.lp_fragment.data[: self.hp_fragment.numel()].copy_(self.hp_fragment.data)


# - where the pieces are


@dataclass(frozen=True)
class _Run:
    """Elements `[param_start, param_start + length)` of a parameter, at `start` of `part`."""

    part: Any
    start: int
    param_start: int
    length: int


def _group_of(param: torch.Tensor) -> Any:
    """The shard group of a parameter, None where the parameter is stepped as it is."""
    optimizer = getattr(param, "_zero_optimizer", None)
    return None if optimizer is None else optimizer.groups[param._index_in_param_group]  # type: ignore[attr-defined]


def _own_runs(group: Any, param: torch.Tensor) -> Iterator[_Run]:
    for segment in group.layout.param_segments(param.param_idx_in_group):  # type: ignore[attr-defined]
        if segment.rank == group.shard_axis.rank:
            for part, offset, start, length in group.runs(segment.shard_start, segment.length):
                yield _Run(part, start, segment.param_start + offset, length)


def _gathered(
    param: torch.Tensor, group: Any, values: Callable[[Any], torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The whole of a state of `param`, on every rank: what each rank holds, zero elsewhere, summed."""
    whole = torch.zeros(_shape_of(param).numel(), dtype=dtype, device=param.device)
    for run in _own_runs(group, param):
        source = values(run.part).reshape(-1).narrow(0, run.start, run.length)
        whole.narrow(0, run.param_start, run.length).copy_(source)
    flat.all_reduce_(whole, group.shard_axis)
    return whole.view(_shape_of(param))


def _shape_of(param: torch.Tensor) -> torch.Size:
    """The shape of a parameter when whole (ZeRO-3 keeps slices)."""
    return getattr(param, "ds_shape", param.shape)


@torch.no_grad()
def _scatter(
    param: torch.Tensor, group: Any, values: Callable[[Any], torch.Tensor], value: torch.Tensor
) -> None:
    """Write the elements of `value` that this rank holds."""
    if value.shape != _shape_of(param):
        raise ValueError(
            explain(
                "a value of another shape",
                got=tuple(value.shape),
                expected=f"the parameter's {tuple(_shape_of(param))}",
            )
        )
    source = value.detach().reshape(-1)
    for run in _own_runs(group, param):
        target = values(run.part).view(-1).narrow(0, run.start, run.length)
        target.copy_(source.narrow(0, run.param_start, run.length))


def _in_memory(param: torch.Tensor) -> AbstractContextManager:
    """Extent in which the states of a parameter's optimizer are in memory, files or not."""
    return param._zero_optimizer.in_memory()  # type: ignore[attr-defined]


def _state_of(param: torch.Tensor, group: Any, key: str) -> Callable[[Any], torch.Tensor] | None:
    """Gives a part's element-wise state; None while the optimizer keeps none under that name."""
    state = param._zero_optimizer.optimizer.state  # type: ignore[attr-defined]
    found = state.get(group.parts[0].master, {}).get(key)
    if not isinstance(found, torch.Tensor) or found.numel() != group.parts[0].length:
        return None
    return lambda part: state[part.master][key]


# - whole tensors


def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The parameter's master weight, whole; None where an optimizer steps the parameter itself.

    Example:
        >>> weight = safe_get_full_fp32_param(model.head.weight)  # on every rank
    """
    group = _group_of(param)
    if group is None:
        return None
    dtype = torch.promote_types(group.parts[0].master.dtype, torch.float32)
    with _in_memory(param):
        return _gathered(param, group, lambda part: part.master.data, dtype)


def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> Any:
    """An optimizer state of the parameter (`exp_avg`, …), whole; None where there is none (yet)."""
    group = _group_of(param)
    if group is None:
        return None
    with _in_memory(param):
        values = _state_of(param, group, optim_state_key)
        if values is None:
            optimizer = param._zero_optimizer.optimizer  # type: ignore[attr-defined]
            return optimizer.state.get(group.parts[0].master, {}).get(optim_state_key)
        return _gathered(param, group, values, values(group.parts[0]).dtype)


def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The parameter's gradient after a backward pass and before the step, whole; None where there is none.

    `param.grad` where it is set, else the gradient as it was reduced (times the loss scale under fp16).
    """
    if param.grad is not None:
        return param.grad
    group = _group_of(param)
    if group is None or not _has_grads(group, param):
        return None
    with group.grads_in_memory():
        return _gathered(param, group, lambda part: part.grad, torch.float32)


def _has_grads(group: Any, param: torch.Tensor) -> bool:
    if not all(part.has_grad for part in group.parts):
        return False
    return group.shard_axis.size > 1 or bool(group._written[param.param_idx_in_group])  # type: ignore[attr-defined]


def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the parameter and its master weight; every rank gives the same whole tensor."""
    group = _group_of(param)
    if group is None:
        return
    with _in_memory(param):
        _scatter(param, group, lambda part: part.master.data, value)
        if group.params_sharded:
            group.lower_param(param.param_idx_in_group)  # type: ignore[attr-defined]
    if param.shape == value.shape:  # not while only the slice is there
        with torch.no_grad():
            param.data.copy_(value)


def safe_set_full_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set an optimizer state of the parameter; every rank gives the same whole tensor.

    Raises:
        KeyError: the optimizer keeps no such state (yet).
    """
    group = _group_of(param)
    if group is None:
        return
    with _in_memory(param):
        values = _state_of(param, group, optim_state_key)
        if values is None:
            raise KeyError(
                explain(
                    "the optimizer keeps no such state",
                    got=optim_state_key,
                    fix="Take a step first.",
                )
            )
        _scatter(param, group, values, value)


def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the gradient that the next step uses; every rank gives the same whole tensor."""
    group = _group_of(param)
    if param.grad is not None:
        param.grad.copy_(value)
    elif group is not None and _has_grads(group, param):
        with group.grads_in_memory(edit=True):
            _scatter(param, group, lambda part: part.grad, value)


def safe_update_full_grad_vectorized(
    param_list: Iterable[torch.nn.Parameter],
    update_func: Callable[[torch.Tensor | None, torch.nn.Parameter], torch.Tensor | None],
) -> None:
    """Replace each parameter's gradient by `update_func(gradient, parameter)`; None leaves it."""
    for param in param_list:
        changed = update_func(safe_get_full_grad(param), param)
        if changed is not None:
            safe_set_full_grad(param, changed)


# - one rank's part: a notion of stage 3, where a parameter is cut by itself


def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's shard of a parameter's master weight under ZeRO-3; None below."""
    return _of_stage3(param, "get_local_fp32_param")


def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's shard of a parameter's gradient under ZeRO-3; None below."""
    return _of_stage3(param, "get_local_fp32_grad_for_param")


def safe_get_local_optimizer_state(
    param: torch.nn.Parameter, optim_state_key: str
) -> torch.Tensor | None:
    """This rank's shard of an optimizer state under ZeRO-3; None below."""
    return _of_stage3(param, "get_local_fp32_param", optim_state_key)


def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's shard of a parameter's master weight under ZeRO-3; nothing below.

    A parameter that is whole at the time keeps its old values until it is gathered again, after the next step at the
    latest: one rank's call cannot have the others gather.
    """
    _of_stage3(param, "set_local_hp_param", value)


def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's shard of a parameter's gradient under ZeRO-3; nothing below."""
    _of_stage3(param, "set_local_grad_for_param", value)


def safe_set_local_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set this rank's shard of an optimizer state under ZeRO-3; nothing below."""
    _of_stage3(param, "set_local_hp_param", value, optim_state_key)


def _of_stage3(param: torch.nn.Parameter, method: str, *arguments: Any) -> Any:
    optimizer = getattr(param, "_z3_optimizer", None)
    return None if optimizer is None else getattr(optimizer, method)(*_call_order(param, arguments))


def _call_order(param: torch.nn.Parameter, arguments: Sequence[Any]) -> list[Any]:
    """The value goes before the parameter, a state's name after it."""
    values = [item for item in arguments if not isinstance(item, str)]
    return [*values, param, *(item for item in arguments if isinstance(item, str))]


# - links from a parameter to its state


def get_hp_fragment_mapping(param: torch.nn.Parameter) -> tensor_fragment | None:
    """This rank's part of a parameter; None when the rank holds none of it."""
    group = _group_of(param)
    runs = [] if group is None else list(_own_runs(group, param))
    if not runs:
        return None
    first, numel = runs[0], sum(run.length for run in runs)
    if group.params_sharded:
        own = group.read_own(group.layout.starts[param.param_idx_in_group], numel)  # type: ignore[attr-defined]
    else:
        own = param.data.view(-1).narrow(0, first.param_start, numel)
    with _in_memory(param):
        high = first.part.master.data.narrow(0, first.start, first.length)
        high = high if first.part.spilled is None else high.clone()
    return tensor_fragment(
        own,
        fragment_address(numel, first.param_start),
        high,
        fragment_address(numel, first.part.start + first.start),
        group.param_group_index,
    )


def get_full_hp_param(self: torch.nn.Parameter, optim_state_key: str | None = None) -> Any:
    """The master weight, or an optimizer state; bound to parameters by `link_hp_params`."""
    return (
        safe_get_full_fp32_param(self)
        if optim_state_key is None
        else safe_get_full_optimizer_state(self, optim_state_key)
    )


def get_full_hp_grad(self: torch.nn.Parameter) -> torch.Tensor | None:
    """The gradient; bound to parameters by `link_hp_params`."""
    return safe_get_full_grad(self)


def set_full_hp_param(
    self: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str | None = None
) -> None:
    """Set the master weight, or an optimizer state; bound to parameters by `link_hp_params`."""
    if optim_state_key is None:
        safe_set_full_fp32_param(self, value)
    else:
        safe_set_full_optimizer_state(self, value, optim_state_key)


def set_full_hp_grad(self: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the gradient; bound to parameters by `link_hp_params`."""
    safe_set_full_grad(self, value)


def link_hp_params(params: Iterable[torch.nn.Parameter]) -> None:
    """Give parameters of a sharded optimizer `_hp_mapping` and the methods `get_full_hp_param`, `get_full_hp_grad`, …"""
    for param in params:
        param._hp_mapping = get_hp_fragment_mapping(param)  # type: ignore[attr-defined]
        for function in (get_full_hp_param, get_full_hp_grad, set_full_hp_param, set_full_hp_grad):
            setattr(param, function.__name__, types.MethodType(function, param))


def map_to_flat_opt_states(*_: Any, **__: Any) -> None:
    """Not needed here: optimizer states are flat from the start.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        explain(
            "optimizer states are flat already",
            fix="Read them by safe_get_full_optimizer_state, or from optimizer.state.",
        )
    )
