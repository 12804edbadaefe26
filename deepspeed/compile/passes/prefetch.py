# SPDX-License-Identifier: Apache-2.0
"""Gathers start before they are needed: as many as may be on their way at once, in the order of their uses."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from deepspeed.utils.logging import log_dist

from .. import fx
from ..profilers import is_complete
from .contract import PassContract

NAME = "prefetch"
CONTRACT = PassContract(requires=frozenset({"z3"}))


def print_rank_0(message: str) -> None:
    """Log on the first rank."""
    log_dist(message, ranks=[0])


def schedule_prefetch(
    gm: GraphModule,
    graph_id: int,
    graph_order: Any,
    profiling_results: Any,
    create_inputs_fn: Any,
    mem_budget: float,
    param_manager: Any,
    bwd: bool,
) -> GraphModule:
    """Move the starts of gathers up, within the limits of `zero_optimization` for prefetching and live parameters."""
    if not is_complete(profiling_results[graph_id], bwd) or is_profile_incomplete(gm.graph):
        print_rank_0(f"graph {graph_id}: no prefetching, on account of incomplete profiling data")
        return gm
    managed = param_manager[graph_id]
    graph = gm.graph
    waits = fx.nodes_calling(graph, torch.ops.dc.wait_allgather.default)
    order = fx.positions(graph)
    ends = [max((order[user] for user in wait.users), default=order[wait]) for wait in waits]
    sizes = [managed.numel_of(wait.args[2]) for wait in waits]
    following = 0
    for at, wait in enumerate(waits):
        place = wait
        if following <= at:
            _start_before(graph, place, waits[at])
            following = at + 1
        live = sum(sizes[k] for k in range(at + 1) if ends[k] >= order[wait])
        flying = sum(sizes[at + 1 : following])
        while following < len(waits) and _fits(managed, flying, live, sizes[following]):
            _start_before(graph, place, waits[following])
            flying += sizes[following]
            following += 1
    fx.finish(gm)
    return gm


def _fits(managed: Any, flying: int, live: int, more: int) -> bool:
    return (
        flying + more <= managed.prefetch_numel and live + flying + more <= managed.max_live_numel
    )


def _start_before(graph: Any, place: Node, wait: Node) -> None:
    start = wait.args[0]
    assert isinstance(start, Node)
    if start.next is not place:
        place.prepend(start)


def is_profile_incomplete(graph: Any) -> bool:
    """Whether a profile by running the graph was broken off."""
    return any(node.meta.get("profile_incomplete") for node in graph.nodes)
