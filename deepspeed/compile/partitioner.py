# SPDX-License-Identifier: Apache-2.0
"""Where a joint graph is cut into forward and backward: nothing that shows a gathered parameter may cross."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Graph

from .util import get_no_copy_ops


def _recompute_param_aliases(graph: Graph, param_indices: Iterable[tuple[int, int, Any]]) -> None:
    """Have the backward graph make views of parameters anew, from the parameter, which it gathers.

    Args:
        graph: the joint graph.
        param_indices: of each parameter its place among the inputs, its number and its shape.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    shown = {inputs[place] for place, _, _ in param_indices if place < len(inputs)}
    no_copy = get_no_copy_ops()
    for node in graph.nodes:
        node.meta.setdefault("ac_graph_id", 1)
        is_view = node.op == "call_function" and node.target in no_copy
        if is_view and any(used in shown for used in node.all_input_nodes[:1]):
            shown.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
