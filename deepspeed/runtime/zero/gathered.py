# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters made whole for a while, to be read or edited by the caller.

[Note: Edits that are nobody's]
Without `modifier_rank` it is not said whose edit counts, so edits are dropped with the gathered values. Where one rank
holds everything, "gathered" is no copy: the edit is in the slice itself. It is undone from the master weight where the
optimizer keeps one, else it stays, and a warning says so. With `enable_sanity_checks` any such edit is an error, on all
ranks, even one that is taken back; that costs a copy of what is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .constructors import plain_constructors
from .own_slice import ZeroParamStatus, is_its_slice, write_back
from .residency import register_external
from .sharded_param import gather, release
from .spill import together
from .utils import is_zero_param

_warned = False


class GatheredParameters:
    """Context in which sharded parameters are whole; whole ones are left as they are. A collective of their ranks.

    Args:
        params: a parameter, or an iterable of tensors.
        modifier_rank: rank in the parameters' group whose edits are kept on all ranks; None where nothing is edited.
            Edits that nobody is named for are dropped; see [Note: Edits that are nobody's].
        fwd_module: module to which the parameters are registered as external.
        enabled: False makes it do nothing.

    Raises:
        RuntimeError: on entering it inside another one on the same parameters, if either of the two edits them. On
            leaving it, on all ranks: `modifier_rank` has given a parameter another shape or dtype; edits without
            `modifier_rank`, where `enable_sanity_checks` is on.

    Example:
        >>> with deepspeed.zero.GatheredParameters(model.head.weight, modifier_rank=0):
        ...     torch.nn.init.zeros_(model.head.weight)
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, torch.Tensor) else list(params)
        self.params: list[Any] = list(dict.fromkeys(p for p in given if is_zero_param(p)))
        self.enabled = enabled and bool(self.params)
        self.modifier_rank = modifier_rank
        self._gathered: list[Any] = []
        self._versions: list[int] = []
        self._before: dict[int, torch.Tensor] = {}
        if self.enabled and fwd_module is not None:
            for param in self.params:
                register_external(fwd_module, param)

    @plain_constructors()
    def __enter__(self) -> None:
        if not self.enabled:
            return
        edits = self.modifier_rank is not None
        for param in self.params:
            _refuse_overlap(param, edits)
        self._gathered = [p for p in self.params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        gather(self.params)
        for param in self.params:
            param.ds_open_gathers = [*getattr(param, "ds_open_gathers", []), edits]
            if param.ds_enable_sanity_checks and not edits:
                self._before[id(param)] = param.detach().clone()
        self._versions = [p._version for p in self.params]

    @plain_constructors()
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.enabled:
            return
        for param in self.params:
            param.ds_open_gathers = param.ds_open_gathers[:-1]
        try:
            if kind is None and self.modifier_rank is None:
                self._drop_edits()
            elif kind is None:
                self._keep_edits()
        finally:
            self._before.clear()
            release(
                p for p in self._gathered if not p.ds_active_sub_modules and not p.ds_open_gathers
            )

    def _keep_edits(self) -> None:
        changed = [p for p in self.params if p.shape != p.ds_shape or p.dtype != _dtype_of(p)]
        if not _all_agree(self.params, not changed):
            got = "another rank's edit; see its message"
            if changed:
                got = f"{tuple(changed[0].shape)} of {changed[0].dtype}"
                got += f" for {tuple(changed[0].ds_shape)} of {_dtype_of(changed[0])}"
            raise RuntimeError(
                explain(
                    "an edit gave a gathered parameter another shape or dtype",
                    got=got,
                    expected="values edited in place",
                    fix="put a new nn.Parameter into the module for another shape, before deepspeed.initialize",
                )
            )
        for param in self.params:
            flat.broadcast_(param.data, param.ds_home, src=self.modifier_rank)
            with nullcontext() if param.ds_spill is None else _writing(param):
                write_back(param)
        _refresh_masters([p for p in self.params if hasattr(p, "_refresh_master")])

    def _drop_edits(self) -> None:
        versions = list(zip(self.params, self._versions, strict=True))
        if self._before:
            edited = [p for p, version in versions if self._is_edited(p, version)]
            if not _all_agree(self.params, not edited):
                _restore_all(edited, self._before)
                raise RuntimeError(_lost_edit(edited))
            return
        for param, version in versions:
            if param._version != version and is_its_slice(param):
                _undo(param)

    def _is_edited(self, param: Any, version: int) -> bool:
        before = self._before.get(id(param))
        if before is None:
            return False
        now = param.data
        return (
            param._version != version
            or now.shape != before.shape
            or not torch.equal(_bits(now), _bits(before))
        )


def _refresh_masters(params: list[Any]) -> None:
    with ExitStack() as stack:
        for optimizer in dict.fromkeys(p._zero_optimizer for p in params):
            stack.enter_context(optimizer.in_memory())
        for param in params:
            param._refresh_master()


def _writing(param: Any) -> AbstractContextManager:
    return together(param.ds_home, "write an edited parameter")


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bytes: NaN is equal to itself there."""
    return values.detach().contiguous().view(-1).view(torch.uint8)


def _dtype_of(param: Any) -> torch.dtype:
    """The dtype that a gathered parameter should have."""
    if param.ds_codec is not None:
        return param.ds_codec.dtype
    return param.ds_wire.dtype if param.ds_packed else param.ds_tensor.dtype


def _all_agree(params: Iterable[Any], ok: bool) -> bool:
    """Vote of all ranks that hold the parameters."""
    axes: list[Axis] = []
    for param in params:
        if param.ds_home not in axes:
            axes.append(param.ds_home)
    return all([flat.all_ok(ok, axis) for axis in axes])


def _lost_edit(edited: list[Any]) -> str:
    got = "an in-place modification on another rank"
    if edited:
        got = f"an in-place modification of a parameter of shape {tuple(edited[0].ds_shape)}, modifier_rank=None"
    return explain(
        "a gathered parameter was edited, and the edit would be lost",
        got=got,
        expected="modifier_rank= with the rank whose edit counts",
        fix="pass modifier_rank=0 to GatheredParameters",
    )


def _restore_all(edited: list[Any], before: dict[int, torch.Tensor]) -> None:
    """Take edits back where they are in the slice itself."""
    for param in edited:
        if is_its_slice(param):
            param.ds_tensor.copy_(before[id(param)].view(-1))


def _undo(param: Any) -> None:
    """Take an edit of the slice itself back, if the optimizer knows the values; else say that it stays."""
    global _warned
    optimizer = getattr(param, "_zero_optimizer", None)
    if optimizer is not None:
        group = optimizer.groups[param._index_in_param_group]
        if all(part.low is not None for part in group.parts):
            with optimizer.in_memory():
                group.lower_param(param.param_idx_in_group)
            return
    if not _warned:
        _warned = True
        logger.warning(
            "GatheredParameters without modifier_rank: an edit of a parameter of shape "
            f"{tuple(param.ds_shape)} stays, because this one rank holds all of it; on several ranks it would be "
            "dropped. Pass modifier_rank=0 to keep edits everywhere."
        )


def _refuse_overlap(param: Any, edits: bool) -> None:
    opened = getattr(param, "ds_open_gathers", [])
    if opened and (edits or any(opened)):
        raise RuntimeError(
            explain(
                "a parameter is gathered for editing while another GatheredParameters has it open",
                got=f"two overlapping contexts on a parameter of shape {tuple(param.ds_shape)}",
                expected="one of them at a time, unless both only read",
                fix="leave the outer context before you enter the one with modifier_rank",
            )
        )
