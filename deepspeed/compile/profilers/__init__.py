# SPDX-License-Identifier: Apache-2.0
"""What a graph takes, known from its shapes: no run is needed, and all ranks come to the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from .. import fx

Rows = list[tuple[str, int, int, int]]


@dataclass
class ProfilingResult:
    """What is known of one pair of graphs.

    Attributes:
        fwd_graph, bwd_graph: the graphs; None before they are there.
        needs_backward: whether a backward graph follows.
        fwd_mem, bwd_mem: for each node its name, bytes after it, by how many they changed, and bytes at most.
        fwd_mem_complete, bwd_mem_complete: False where rows are missing.
        num_fwd_outputs: how many of the forward graph's outputs are the caller's.
    """

    fwd_graph: Graph | None = None
    bwd_graph: Graph | None = None
    needs_backward: bool = False
    fwd_mem: Rows = field(default_factory=list)
    bwd_mem: Rows = field(default_factory=list)
    fwd_time: list[Any] = field(default_factory=list)
    bwd_time: list[Any] = field(default_factory=list)
    fwd_mem_complete: bool = True
    bwd_mem_complete: bool = True
    num_fwd_outputs: int = 0


def is_complete(result: ProfilingResult, bwd: bool) -> bool:
    """Whether the rows of one of the two graphs are all there."""
    return result.bwd_mem_complete if bwd else result.fwd_mem_complete


def memory_rows(graph: Graph, base: int = 0) -> Rows:
    """The memory of a graph's own tensors, node by node, each let go after its last use.

    Args:
        graph: a traced graph.
        base: bytes that are taken by others.
    """
    dies: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        users = list(node.users)
        if users and not any(user.op == "output" for user in users) and node.op != "placeholder":
            dies.setdefault(_last(users, graph), []).append(node)
    rows, live = [], base
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        made = fx.nbytes(node)
        freed = sum(fx.nbytes(each) for each in dies.get(node, []))
        peak, live = live + made, live + made - freed
        rows.append((node.name, live, made - freed, peak))
    return rows


def _last(users: list[Node], graph: Graph) -> Node:
    last = users[0]
    for user in users[1:]:
        if last < user:
            last = user
    return last
