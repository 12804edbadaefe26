# SPDX-License-Identifier: Apache-2.0
"""Steps optimizers that must see whole parameters, over shards that are cut without regard to them.

Each parameter gets an owner among the ranks of the shard axis. The ranks send it their pieces, it computes the update of
the whole, and sends the pieces of that back: each element travels once each way, and no rank computes what another does.
Parameters go in rounds, so that what is in flight is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deepspeed.comm.mesh import Axis
from deepspeed.comm.uneven import exchange_uneven

from .layout import Layout
from .own_slice import shape_of
from .shard_group import ShardGroup


class WholeRule(Protocol):
    """An optimizer whose rule is elementwise but for one step on whole parameters; see `MuonWithAuxAdam`."""

    def needs_whole(self, group: Mapping[str, Any]) -> bool: ...

    def direction(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        run: Tensor,
        start: int,
        grad: Tensor,
        grad_scale: float,
    ) -> Tensor: ...

    def whole_update(self, group: Mapping[str, Any], direction: Tensor) -> Tensor: ...

    def apply(self, group: Mapping[str, Any], run: Tensor, update: Tensor) -> None: ...


def needs_whole(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Whether `optimizer` must see the whole parameters of `group`."""
    asked = getattr(optimizer, "needs_whole", None)
    return asked is not None and bool(asked(group))


def step_whole(
    rule: WholeRule, inner: Mapping[str, Any], group: ShardGroup, grad_scale: float
) -> None:
    """Step a group's shard, collectively over its shard axis; the params' own shard is written, too.

    Args:
        rule: the optimizer, whose state is kept for the group's flat masters.
        inner: the param group that hyperparameters are read from.
        group: the parameters.
        grad_scale: gradients are multiplied by it.
    """
    shapes = [shape_of(param) for param in group.params]
    for owners in rounds(group.layout, shapes, group.plan.bucket_numel):
        _step_round(rule, inner, group, grad_scale, shapes, owners)
    for part in group.parts:
        group.lower(part)


def rounds(
    layout: Layout, shapes: Sequence[torch.Size], most: int
) -> Iterator[list[tuple[int, int]]]:
    """Lists of `(param, owner)`: all parameters once, large ones first, at most about `most` elements an owner in a list.

    The work of a parameter grows with its elements times its shorter side; owners are chosen so that it is even.
    """
    order = sorted(range(len(shapes)), key=lambda i: -layout.numels[i])
    found: list[tuple[int, int]] = []
    held, load = 0, [0.0] * layout.world
    for param in order:
        numel = layout.numels[param]
        if found and held + numel > most * layout.world:
            yield found
            found, held, load = [], 0, [0.0] * layout.world
        owner = min(range(layout.world), key=load.__getitem__)
        load[owner] += float(numel) * min(shapes[param][-2:])
        found.append((param, owner))
        held += numel
    if found:
        yield found


def _step_round(
    rule: WholeRule,
    inner: Mapping[str, Any],
    group: ShardGroup,
    grad_scale: float,
    shapes: Sequence[torch.Size],
    owners: Sequence[tuple[int, int]],
) -> None:
    axis = group.shard_axis
    mine: list[list[_Piece]] = [[] for _ in range(axis.size)]  # by the rank that they go to
    theirs: list[list[_Piece]] = [[] for _ in range(axis.size)]  # by the rank that they come from
    for piece in _pieces(group.layout, owners):
        holder, owner = piece[:2]
        if holder == axis.rank:
            mine[owner].append(piece)
        if owner == axis.rank:
            theirs[holder].append(piece)
    sent = [_lengths(run) for run in mine]
    received = [_lengths(run) for run in theirs]
    dtype = group.precision.master_dtype(group.dtype)
    outgoing = torch.empty(sum(sent), dtype=dtype, device=group.device)
    for at, (_, _, _, _, shard_start, length) in _laid_out(mine):
        for part, offset, start, count in group.runs(shard_start, length):
            run = part.master.data.narrow(0, start, count)
            grad = group.grad_of(part).narrow(0, start, count)
            values = rule.direction(inner, part.master, run, start, grad, grad_scale)
            outgoing.narrow(0, at + offset, count).copy_(values)
    incoming = _exchanged(outgoing, received, sent, axis)
    whole = {
        param: torch.empty(group.layout.numels[param], dtype=dtype, device=group.device)
        for param, owner in owners
        if owner == axis.rank
    }
    for at, (_, _, param, param_start, _, length) in _laid_out(theirs):
        whole[param].narrow(0, param_start, length).copy_(incoming.narrow(0, at, length))
    for param, direction in whole.items():
        whole[param] = rule.whole_update(inner, direction.view(shapes[param])).reshape(-1)
    for at, (_, _, param, param_start, _, length) in _laid_out(theirs):
        incoming.narrow(0, at, length).copy_(whole[param].narrow(0, param_start, length))
    updates = _exchanged(incoming, sent, received, axis)
    for at, (_, _, _, _, shard_start, length) in _laid_out(mine):
        for part, offset, start, count in group.runs(shard_start, length):
            update = updates.narrow(0, at + offset, count).to(part.master.device)
            rule.apply(inner, part.master.data.narrow(0, start, count), update)


_Piece = tuple[int, int, int, int, int, int]
"""(rank that holds it, owner, param, start in param, start in the holder's shard, length)"""


def _pieces(layout: Layout, owners: Sequence[tuple[int, int]]) -> list[_Piece]:
    return [
        (s.rank, owner, param, s.param_start, s.shard_start, s.length)
        for param, owner in owners
        for s in layout.param_segments(param)
    ]


def _lengths(pieces: Sequence[_Piece]) -> int:
    return sum(piece[-1] for piece in pieces)


def _laid_out(runs: Sequence[Sequence[_Piece]]) -> Iterator[tuple[int, _Piece]]:
    """The pieces of a buffer that holds the runs one behind the other, with where they begin in it."""
    at = 0
    for run in runs:
        for piece in run:
            yield at, piece
            at += piece[-1]


def _exchanged(parts: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    if axis.size == 1:
        return parts
    out = parts.new_empty(sum(received))
    exchange_uneven(out, parts, received, sent, axis)
    return out
