# SPDX-License-Identifier: Apache-2.0
"""Averages of several tensors at once, each rank getting its slice of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.zero.quantized_sum import (
    LOCO_KEEP,
    LOCO_PERIOD,
    ErrorFeedback,
    QuantizedSum,
    RowCodec,
)
from deepspeed.utils import groups as current
from deepspeed.utils.errors import DeepSpeedCommError, explain

_BITS = 4


@torch.no_grad()
def reduce_scatter_coalesced(
    tensors: Sequence[torch.Tensor], group: Any = None
) -> list[torch.Tensor]:
    """Average tensors over a group; each rank gets its slice of each average. Collective.

    Args:
        tensors: of one dtype, any shapes, the same on every rank; not changed.
        group: a process group; None is all ranks.

    Returns:
        Flat slices in the order of `tensors`: `ceil(numel / ranks)` elements, the last ranks' perhaps fewer.

    Example:
        >>> own = reduce_scatter_coalesced([p.grad for p in model.parameters()])  # on every rank
    """
    return _average(tensors, _axis(group), quantized=False)


@torch.no_grad()
def all_to_all_quant_reduce(
    tensors: Sequence[torch.Tensor], groups: Mapping[str, Any] | None = None
) -> list[torch.Tensor]:
    """`reduce_scatter_coalesced` whose matrices travel as 4-bit codes (ZeRO++ qgZ); vectors go as they are.

    Each rank's contribution is off by at most 1/14 of the largest value in its group of 128.

    Args:
        tensors: of one dtype, the same shapes on every rank; not changed.
        groups: process groups by name: `local_<i>` of neighbours, and `global_<i>` of the ranks at the same place of
            the neighbourhoods, if there are several; None is all ranks.
    """
    return _average(tensors, _axis_of_groups(groups), quantized=True)


@torch.no_grad()
def all_to_all_loco_quant_reduce(
    params: Sequence[torch.nn.Parameter],
    groups: Mapping[str, Any] | None = None,
    loco_param: Mapping[str, Any] | None = None,
) -> list[torch.Tensor]:
    """`all_to_all_quant_reduce` of the gradients of parameters, which remember what codes lost of them (LoCo).

    Args:
        params: parameters with gradients.
        groups: as there.
        loco_param: `err_beta` (default 0.8) and `reset_T` (default 1024).
    """
    options = dict(loco_param or {})
    settings = (options.get("err_beta", LOCO_KEEP), options.get("reset_T", LOCO_PERIOD))
    axis, slices = _axis_of_groups(groups), []
    for param in params:
        if param.grad is None:
            raise ValueError(explain("a parameter without a gradient", got=tuple(param.shape)))
        feedback = getattr(param, "_loco_feedback", None)
        if feedback is None:
            feedback = param._loco_feedback = _quantized(param.grad, axis, ErrorFeedback(*settings))
        slices.append(_average_one(param.grad, axis, feedback))
    return slices


def _axis(group: Any) -> Axis:
    return current.current_mesh().world if group is None else Axis.of_group(group)


def _axis_of_groups(groups: Mapping[str, Any] | None) -> Axis:
    if not groups:
        return _axis(None)
    near = [Axis.of_group(group) for name, group in groups.items() if name.startswith("local")]
    far = [Axis.of_group(group) for name, group in groups.items() if name.startswith("global")]
    if len(near) != 1 or len(far) > 1:
        raise DeepSpeedCommError(
            explain(
                "the groups of a two-level exchange are not understood",
                got=", ".join(groups),
                expected="this rank's 'local_<i>', and its 'global_<i>' if there are several machines",
            )
        )
    if not far or far[0].size == 1:
        return near[0]
    node, nodes = near[0], far[0]
    ranks = tuple(
        sorted({first + rank - node.ranks[0] for first in nodes.ranks for rank in node.ranks})
    )
    return Axis(
        None, node.size * nodes.size, nodes.rank * node.size + node.rank, ranks, (node, nodes)
    )


def _average(tensors: Sequence[torch.Tensor], axis: Axis, quantized: bool) -> list[torch.Tensor]:
    if quantized:
        return [_average_one(tensor, axis, _quantized(tensor, axis, None)) for tensor in tensors]
    pieces = [-(-tensor.numel() // axis.size) for tensor in tensors]
    if not tensors:
        return []
    rows = torch.cat([_rows(tensor, axis) for tensor in tensors], dim=1)
    total = rows.new_empty(rows.shape[1])
    flat.reduce_scatter_into(total, rows.view(-1), axis)
    parts = total.div_(axis.size).split(pieces)
    return [_cut(part, tensor, axis) for part, tensor in zip(parts, tensors, strict=True)]


def _quantized(tensor: torch.Tensor, axis: Axis, feedback: ErrorFeedback | None) -> Any:
    row = -(-tensor.numel() // axis.size)
    runs = [(0, row)] if tensor.dim() > 1 else []
    return QuantizedSum(RowCodec.of(row, runs, _BITS), feedback)


def _average_one(tensor: torch.Tensor, axis: Axis, add: Any) -> torch.Tensor:
    rows = _rows(tensor, axis)
    total = rows.new_empty(rows.shape[1])
    add(total, rows.view(-1), axis)
    return _cut(total.div_(axis.size), tensor, axis)


def _rows(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A row for each rank, the last ones filled up with zeros."""
    row = -(-tensor.numel() // axis.size)
    rows = tensor.new_zeros(axis.size * row)
    rows[: tensor.numel()].copy_(tensor.detach().reshape(-1))
    return rows.view(axis.size, row)


def _cut(part: torch.Tensor, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's slice without what filled it up."""
    return part[: max(0, min(part.numel(), tensor.numel() - axis.rank * part.numel()))]
