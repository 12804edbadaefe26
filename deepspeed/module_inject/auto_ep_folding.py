# SPDX-License-Identifier: Apache-2.0
"""Which ranks share experts where tensor-parallel ranks do so as well: ranks of a stage in order, `ep_size` at a time.

Dense layers are divided over `tp_size` neighbours. Of the same ranks, experts are spread over `ep_size` neighbours,
whatever of these is tensor- or data-parallel; a stage holds `edp_size` copies of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.comm.mesh import expert_grid, grid
from deepspeed.utils.errors import explain

Groups = tuple[tuple[int, ...], ...]

AUTOEP_FOLDING_GRAD_REDUCE_AVERAGE = "average"
AUTOEP_FOLDING_GRAD_REDUCE_SUM = "sum"
AUTOEP_FOLDING_GRAD_REDUCE_SKIP = "skip"
AUTOEP_FOLDING_GRAD_REDUCE_EXPERT_TP_CANCEL = "expert_tp_cancel"

_ROUTER, _PARTIAL_ROUTER, _SEQUENCE_NORM = "router", "partial_router", "sp_sharded_layernorm"


@dataclass(frozen=True)
class ParallelFoldingSpec:
    """Sizes of a folded job; see the module."""

    world_size: int
    pp_size: int
    tp_size: int
    ep_size: int
    etp_size: int
    dp_size: int
    edp_size: int
    mp_mode: str = "tp"


@dataclass(frozen=True)
class FoldingGroupTables:
    """The ranks of all groups of each kind."""

    tp_groups: Groups
    dense_dp_groups: Groups
    ep_groups: Groups
    edp_groups: Groups


@dataclass(frozen=True)
class FoldingGroupHandles:
    """One rank's groups, and the ranks in them."""

    spec: ParallelFoldingSpec
    tp_group: Any
    dense_dp_group: Any
    ep_group: Any
    edp_group: Any
    ep_group_name: str
    tp_ranks: tuple[int, ...]
    dense_dp_ranks: tuple[int, ...]
    ep_ranks: tuple[int, ...]
    edp_ranks: tuple[int, ...]


def build_folding_spec(
    world_size: int, pp_size: int, tp_size: int, ep_size: int, etp_size: int = 1
) -> ParallelFoldingSpec:
    """The sizes of a folded job.

    Raises:
        ValueError: they do not divide the ranks of a stage.
    """
    stage = world_size // pp_size
    if world_size % pp_size or stage % tp_size or stage % (ep_size * etp_size):
        raise ValueError(
            explain(
                "the parallel sizes do not divide the number of processes",
                got=f"{world_size} processes, pp {pp_size}, tp {tp_size}, ep {ep_size}, etp {etp_size}",
            )
        )
    return ParallelFoldingSpec(
        world_size,
        pp_size,
        tp_size,
        ep_size,
        etp_size,
        dp_size=stage // tp_size,
        edp_size=stage // (ep_size * etp_size),
    )


def expected_folding_group_tables(spec: ParallelFoldingSpec) -> FoldingGroupTables:
    """The ranks of all groups of a folded job."""
    dense = grid(spec.world_size, tensor=spec.tp_size, pipe=spec.pp_size)
    stages = grid(spec.world_size, pipe=spec.pp_size)["sequence_data"]
    within, across = expert_grid(stages, spec.ep_size * spec.etp_size)
    return FoldingGroupTables(
        *(tuple(map(tuple, found)) for found in (dense["tensor"], dense["data"], within, across))
    )


def local_folding_ranks(rank: int, spec: ParallelFoldingSpec) -> dict[str, tuple[int, ...]]:
    """The ranks of the groups that a rank is in."""
    tables = expected_folding_group_tables(spec)
    kinds = {
        "tp": tables.tp_groups,
        "dense_dp": tables.dense_dp_groups,
        "ep": tables.ep_groups,
        "edp": tables.edp_groups,
    }
    return {kind: next(g for g in found if rank in g) for kind, found in kinds.items()}


def assert_group_matches_spec(
    found: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]], spec: ParallelFoldingSpec
) -> None:
    """Compare expert-parallel and expert-data-parallel groups with those of a folded job.

    Raises:
        RuntimeError: other groups.
    """
    tables = expected_folding_group_tables(spec)
    for kind, got, expected in zip(
        ("expert-parallel", "expert-data-parallel"),
        found,
        (tables.ep_groups, tables.edp_groups),
        strict=True,
    ):
        wanted = {tuple(ranks) for ranks in expected}
        if not {tuple(ranks) for ranks in got} <= wanted:
            raise RuntimeError(
                explain(
                    f"the {kind} ranks: what there is does not match folding spec",
                    got=[list(ranks) for ranks in got],
                    expected=[list(ranks) for ranks in expected],
                )
            )


# - what a gradient of one tensor-parallel rank is of the whole one: for code that reduces by itself


def mark_autoep_folding_router_parameter(param: torch.Tensor) -> None:
    """Say that a parameter is a router's, with the whole gradient on every tensor-parallel rank."""
    param.ds_autoep_folding_family = _ROUTER  # type: ignore[attr-defined]


def mark_autoep_folding_partial_router_parameter(param: torch.Tensor) -> None:
    """Say that a parameter is a router's, with a part of the gradient on each tensor-parallel rank."""
    param.ds_autoep_folding_family = _PARTIAL_ROUTER  # type: ignore[attr-defined]


def mark_autoep_folding_sp_sharded_layernorm_parameter(param: torch.Tensor) -> None:
    """Say that a parameter is a norm's that sees a part of each sequence."""
    param.ds_autoep_folding_family = _SEQUENCE_NORM  # type: ignore[attr-defined]


def autoep_folding_gradient_reduction_strategy(spec: Any, param: torch.Tensor) -> str:
    """How tensor-parallel ranks would make one gradient of a parameter's several.

    The layers of this package need nothing of it: their backward gives every rank the whole gradient, once.

    Returns:
        One of the `AUTOEP_FOLDING_GRAD_REDUCE_*`.
    """
    if spec is None or spec.tp_size <= 1:
        return AUTOEP_FOLDING_GRAD_REDUCE_SKIP
    if not getattr(param, "allreduce", True):
        return AUTOEP_FOLDING_GRAD_REDUCE_EXPERT_TP_CANCEL
    if getattr(param, "tensor_model_parallel", False):
        return AUTOEP_FOLDING_GRAD_REDUCE_SKIP
    family = getattr(param, "ds_autoep_folding_family", None)
    partial = family == _PARTIAL_ROUTER or (family == _SEQUENCE_NORM and spec.mp_mode == "sp")
    return AUTOEP_FOLDING_GRAD_REDUCE_SUM if partial else AUTOEP_FOLDING_GRAD_REDUCE_AVERAGE
