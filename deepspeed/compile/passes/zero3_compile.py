# SPDX-License-Identifier: Apache-2.0
"""ZeRO 3 in graphs: sharded parameters are gathered before their first use, and gone after their last one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import fx
from .contract import PassContract
from .zero_1_and_2_compile import NAME_Z1, NAME_Z2, add_reduce

NAME = "z3"
CONTRACT = PassContract(provides=frozenset({"z3"}), conflicts_with=frozenset({NAME_Z1, NAME_Z2}))


def add_z3_gather_release(
    gm: GraphModule,
    graph_id: int,
    graph_order: Any,
    profiling_results: Any,
    create_inputs_fn: Any,
    mem_budget: float,
    param_manager: Any,
    bwd: bool,
) -> GraphModule:
    """Pass for stage 3."""
    managed = param_manager[graph_id]
    order = fx.positions(gm.graph)
    for node in [node for node in gm.graph.nodes if node.op == "placeholder"]:
        number = managed.ds_ids.get(node.name)
        if number is not None and managed.gathers(number):
            _gather_before_use(gm, node, graph_id, number, order)
    if bwd:
        add_reduce(gm, graph_id, param_manager)
    fx.finish(gm)
    return gm


def _gather_before_use(
    gm: GraphModule, shell: Node, graph_id: int, number: int, order: dict[Node, int]
) -> None:
    users = [user for user in shell.users if user.op != "output"]
    if not users:
        return
    place = fx.first_of(users, order)
    start = fx.add_node_before(
        gm.graph,
        place,
        torch.ops.dc.allgather_param.default,
        (shell, graph_id, number),
        f"allgather_ds_param_{shell.name}_{number}",
    )
    wait = fx.add_node_before(
        gm.graph,
        place,
        torch.ops.dc.wait_allgather.default,
        (start, graph_id, number),
        f"wait_allgather_ds_param_{shell.name}_{number}",
    )
    value = fx.get_node_shape_meta(shell)
    start.meta["val"], wait.meta["val"] = fx.token_like(shell), value
    # What the forward graph saves for the backward graph is the shell, so that the whole values can go.
    fx.replace_node_users(shell, wait, exclude=[start, fx.get_output_node(gm.graph)])
