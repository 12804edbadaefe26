# SPDX-License-Identifier: Apache-2.0
"""The sum of squares of all gradients: each element of the model once, whichever ranks hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.ops.norms import squared_norm
from deepspeed.runtime.norms import PIPE_REPLICATED, is_model_parallel_parameter

from .shard_group import ShardGroup


def expert_group_name(param: torch.nn.Parameter) -> str | None:
    """The expert-parallel group of a parameter, None for one that all data-parallel ranks share."""
    return None if getattr(param, "allreduce", True) else getattr(param, "group_name", None)


def folded(name: str | None, mesh: Mesh) -> bool:
    """Whether tensor-parallel ranks hold experts of a group as data-parallel ones do."""
    if name is None or mesh.tensor.size == 1:
        return False
    return mesh.expert[name].size * mesh.expert_data[name].size > mesh.sequence_data.size


def spread_experts(param: torch.nn.Parameter, mesh: Mesh) -> str | None:
    """The expert-parallel group of a parameter whose ranks hold different experts, else None."""
    name = expert_group_name(param)
    return name if name is not None and mesh.expert[name].size > 1 else None


def counted_elsewhere(param: torch.nn.Parameter, mesh: Mesh) -> bool:
    """Whether another stage of the pipeline, or the first tensor-parallel rank, counts the same weights."""
    if getattr(param, PIPE_REPLICATED, False):
        return True
    later = mesh.pipe.size == 1 and mesh.tensor.rank > 0
    if not later or is_model_parallel_parameter(param):
        return False
    return not folded(expert_group_name(param), mesh)


def whole_square(squares: Mapping[tuple[Axis, str | None], torch.Tensor], mesh: Mesh) -> float:
    """Add up all ranks' squares; a collective of all ranks.

    Args:
        squares: for the ranks that share a run of gradients, and the group of `spread_experts`: the sum of this rank's
            squares, 0-dim float64. The keys and their order are those of the other ranks.
        mesh: the ranks.

    Returns:
        The sum, equal on all ranks.
    """
    total, everywhere, device = 0.0, 0.0, torch.device("cpu")
    for (axis, experts), square in squares.items():
        flat.all_reduce_(square, axis)
        if experts is not None:
            flat.all_reduce_(square, mesh.expert[experts])
        if folded(experts, mesh):
            everywhere += square.item()  # of all tensor-parallel ranks already
        else:
            total += square.item()
        device = square.device
    if mesh.model.size > 1:
        whole = torch.tensor(total, dtype=torch.float64, device=device)
        flat.all_reduce_(whole, mesh.model)
        total = whole.item()
    return total + everywhere


def largest_norm(norm: float, axis: Axis, device: torch.device) -> float:
    """The largest of the norms of gradients that ranks keep apart; infinite where one is not finite. A collective."""
    finite = norm if math.isfinite(norm) else math.inf
    worst = torch.tensor(finite, dtype=torch.float64, device=device)
    flat.all_reduce_(worst, axis, "max")
    return worst.item()


def square_of_groups(groups: Sequence[ShardGroup], mesh: Mesh, device: torch.device) -> float:
    """The sum of the squares of all groups' gradients; a collective of all ranks."""
    squares: dict[tuple[Axis, str | None], torch.Tensor] = {}
    for group in groups:
        key = (group.shard_axis, spread_experts(group.params[0], mesh))
        for part in group.parts:
            square = group.square_of(part).to(device)
            squares[key] = squares[key] + square if key in squares else square
        for own in _counted_elsewhere(group, mesh):
            squares[key] = squares[key] - squared_norm(own).to(device)
    return whole_square(squares, mesh)


def _counted_elsewhere(group: ShardGroup, mesh: Mesh) -> Iterator[torch.Tensor]:
    """This rank's gradients of weights that another rank counts, too."""
    skipped = {at for at, param in enumerate(group.params) if counted_elsewhere(param, mesh)}
    if not skipped:
        return
    for segment in group.layout.segments(group.shard_axis.rank):
        if segment.param in skipped:
            for part, _, start, length in group.runs(segment.shard_start, segment.length):
                yield group.grad_of(part).narrow(0, start, length)
