# SPDX-License-Identifier: Apache-2.0
"""Routed rows shared out among tensor-parallel ranks, which all have the same tokens, and the results put together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist
from deepspeed.utils.errors import explain


@dataclass
class RoutedAssignmentPayload:
    """Rows that are sorted by expert: each is one token on its way to one of its experts.

    Attributes:
        token_indices, expert_indices: the token and the expert of each row, int64.
        assignment_indices: the row's number among those of its expert.
        capacity_slots: which of its token's choices a row is; results are added up in this order.
        combine_weights: what a row's result is multiplied by.
        drop_mask, pad_mask: rows that are not sent.
        input_splits, output_splits: rows to and from each rank.
        extra: `destination_ranks` of the rows, and `num_tokens`.
    """

    token_indices: Tensor
    expert_indices: Tensor
    assignment_indices: Tensor
    capacity_slots: Tensor
    combine_weights: Tensor
    drop_mask: Tensor
    pad_mask: Tensor
    input_splits: list[int]
    output_splits: list[int]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class PartitionContext:
    """What `restore_combined` needs to know of a partition.

    Attributes:
        payload: all ranks' rows.
        local_indices: the rows of this rank.
        lanes: the rank of each row, -1 for one that is not sent.
        tp_size: number of ranks.
    """

    payload: RoutedAssignmentPayload
    local_indices: Tensor
    lanes: Tensor
    tp_size: int


class _GatherRows(torch.autograd.Function):
    """Forward, all ranks' rows, padded to the longest; backward, the sum of all ranks' gradients of the own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, longest: int, size: int, group: Any) -> Tensor:
        ctx.group, ctx.rank, ctx.count = group, dist.get_rank(group=group), rows.shape[0]
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: ctx.count] = rows
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rank, : ctx.count], None, None, None


def assignment_ordinals_by_expert(expert_indices: Tensor) -> Tensor:
    """The number of each row among those of its expert, for rows that are sorted by expert."""
    if not expert_indices.numel():
        return expert_indices.clone()
    positions = torch.arange(expert_indices.numel(), device=expert_indices.device)
    return positions - torch.searchsorted(expert_indices, expert_indices.contiguous())


def partition_assignments(
    payload: RoutedAssignmentPayload, tp_group: Any, tp_rank: int, tp_size: int
) -> tuple[RoutedAssignmentPayload, PartitionContext]:
    """Take this rank's share of the rows: each expert's rows go round among the ranks.

    Args:
        payload: all rows, the same on all ranks.
        tp_group: the ranks; not used, as every rank can tell all shares.
        tp_rank, tp_size: this rank and their number.
    """
    kept = ~(payload.drop_mask | payload.pad_mask)
    lanes = torch.where(kept, payload.assignment_indices % tp_size, -1)
    mine = (lanes == tp_rank).nonzero().view(-1)

    def take(values: Tensor) -> Tensor:
        return values.index_select(0, mine)

    splits = payload.input_splits
    destinations = payload.extra.get("destination_ranks")
    if splits and destinations is not None:
        splits = torch.bincount(take(destinations), minlength=len(splits)).tolist()
    local = replace(
        payload,
        token_indices=take(payload.token_indices),
        expert_indices=take(payload.expert_indices),
        assignment_indices=take(payload.assignment_indices),
        capacity_slots=take(payload.capacity_slots),
        combine_weights=take(payload.combine_weights),
        drop_mask=take(payload.drop_mask),
        pad_mask=take(payload.pad_mask),
        input_splits=splits,
    )
    return local, PartitionContext(payload, mine, lanes, tp_size)


def dispatch_counters(context: PartitionContext) -> dict[str, int]:
    """How many rows there are, this rank has, and were padding or dropped."""
    payload = context.payload
    return {
        "assignments_total": int((context.lanes >= 0).sum()),
        "assignments_local": int(context.local_indices.numel()),
        "padded": int(payload.pad_mask.sum()),
        "dropped": int((payload.drop_mask & ~payload.pad_mask).sum()),
    }


def restore_combined(
    values: Tensor, context: PartitionContext, tp_group: Any, validate_coverage: bool = False
) -> Tensor:
    """Add up the results of all ranks' rows for each token, in the order of the token's choices on every rank.

    Args:
        values: [rows of this rank, dim].
        context: what `partition_assignments` returned.
        tp_group: the ranks; None for this one alone.
        validate_coverage: check that every row has its result.

    Returns:
        [num_tokens, dim] of the values' dtype. Backward, all ranks' gradients of it are added up.

    Raises:
        RuntimeError: rows without a result.
    """
    payload, rows = context.payload, context.local_indices
    weights = payload.combine_weights.index_select(0, rows)
    if weights.dtype != torch.float64:
        weights = weights.float()
    weighted = values * weights.unsqueeze(-1)
    if tp_group is not None and context.tp_size > 1:
        shares = [(context.lanes == lane).nonzero().view(-1) for lane in range(context.tp_size)]
        longest = max(share.numel() for share in shares)
        gathered = _GatherRows.apply(weighted, longest, context.tp_size, tp_group)  # type: ignore[no-untyped-call]
        weighted = torch.cat(
            [part[: len(share)] for part, share in zip(gathered, shares, strict=True)]
        )
        rows = torch.cat(shares)
    if validate_coverage:
        wanted = (context.lanes >= 0).nonzero().view(-1)
        if not torch.equal(rows.sort().values, wanted):
            raise RuntimeError(
                explain(
                    "restore coverage mismatch: not every routed row has one result",
                    got=f"{rows.numel()} rows",
                    expected=f"{wanted.numel()} rows",
                )
            )
    return _in_slot_order(weighted, rows, payload).to(values.dtype)


def _in_slot_order(weighted: Tensor, rows: Tensor, payload: RoutedAssignmentPayload) -> Tensor:
    """Sum rows by token, one choice after another, so that every rank rounds alike."""
    tokens = payload.token_indices.index_select(0, rows)
    total = weighted.new_zeros((int(payload.extra["num_tokens"]), weighted.shape[-1]))
    if not rows.numel():
        return total + weighted.sum()  # of nothing: keeps the graph, whose backward is a collective
    slots = payload.capacity_slots.index_select(0, rows)
    order = torch.argsort(slots, stable=True)
    order = order.index_select(0, torch.argsort(tokens.index_select(0, order), stable=True))
    tokens, weighted = tokens.index_select(0, order), weighted.index_select(0, order)
    turn = assignment_ordinals_by_expert(tokens)
    for number in range(int(turn.max()) + 1):
        now = (turn == number).nonzero().view(-1)
        total = total.index_add(0, tokens.index_select(0, now), weighted.index_select(0, now))
    return total


def assert_tp_payload_consistent(
    payload: RoutedAssignmentPayload, tp_group: Any, tp_size: int
) -> None:
    """Compare the routing of all tensor-parallel ranks; a collective of them.

    Raises:
        RuntimeError: they chose differently.
    """
    if tp_size <= 1 or not dist.is_initialized():
        return
    parts = (payload.token_indices, payload.expert_indices, payload.capacity_slots)
    place = torch.arange(1, payload.token_indices.numel() + 1, device=payload.token_indices.device)
    sums = [(part.to(torch.int64) * place).sum() for part in parts]
    seen = torch.stack([torch.tensor(place.numel(), device=place.device), *sums])
    low, high = seen.clone(), seen.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=tp_group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=tp_group)
    if not torch.equal(low, high):
        raise RuntimeError(
            explain(
                "routing decisions differ between tensor-parallel ranks",
                got=f"checksums {low.tolist()} and {high.tolist()}",
                expected="the same tokens, and the same router, on all of them",
                fix="give all ranks of a tensor-parallel group the same inputs",
            )
        )
