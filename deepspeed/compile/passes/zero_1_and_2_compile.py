# SPDX-License-Identifier: Apache-2.0
"""ZeRO 1 and 2 in backward graphs: gradients go to the reducer as soon as they are there."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from .. import fx
from .contract import PassContract

NAME_Z1 = "z1"
NAME_Z2 = "z2"
CONTRACT_Z1 = PassContract(provides=frozenset({"z1"}), conflicts_with=frozenset({NAME_Z2}))
CONTRACT_Z2 = PassContract(provides=frozenset({"z2"}), conflicts_with=frozenset({NAME_Z1}))


def add_reduce(gm: GraphModule, graph_id: int, param_manager: Any) -> None:
    """Hand each gradient of a backward graph over right after it has been computed, and return None in its place."""
    graph = gm.graph
    outputs = fx.outputs_of(graph)
    for position, number in param_manager[graph_id].grads.items():
        grad = outputs[position] if position < len(outputs) else None
        if grad is None:
            continue
        node = fx.add_node_before(
            graph,
            fx.after(graph, grad),
            torch.ops.dc.reduce_grad.default,
            (grad, graph_id, number),
            f"reduce_grad_{abs(number)}",
        )
        node.meta["val"] = fx.token_like(grad)
        outputs[position] = node
    fx.set_outputs(graph, outputs)
    if fx.nodes_calling(graph, torch.ops.dc.reduce_grad.default):
        fx.add_end_backward(graph, graph_id)
        fx.replace_reduce_outputs_with_none(graph)
    fx.finish(gm)


def add_z1_reduce(
    gm: GraphModule,
    graph_id: int,
    graph_order: Any,
    profiling_results: Any,
    create_inputs_fn: Any,
    mem_budget: float,
    param_manager: Any,
    bwd: bool,
) -> GraphModule:
    """Pass for stage 1; forward graphs stay as they are."""
    if bwd:
        add_reduce(gm, graph_id, param_manager)
    return gm


def add_z2_reduce(
    gm: GraphModule,
    graph_id: int,
    graph_order: Any,
    profiling_results: Any,
    create_inputs_fn: Any,
    mem_budget: float,
    param_manager: Any,
    bwd: bool,
) -> GraphModule:
    """Pass for stage 2; the reducer knows that the sums are cut at once."""
    if bwd:
        add_reduce(gm, graph_id, param_manager)
    return gm
