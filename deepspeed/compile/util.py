# SPDX-License-Identifier: Apache-2.0
"""What several passes need: whether DeepCompile can run here, its handle, and who uses a node until when."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from deepspeed.utils.torch import required_torch_version

from . import graph_ops, graph_params

MIN_TORCH = 2.6
MIN_TORCH_INDUCTOR = 2.13


def is_deepcompile_supported() -> bool:
    """Whether this torch is new enough."""
    return required_torch_version(min_version=MIN_TORCH)


def is_inductor_supported() -> bool:
    """Whether this torch's inductor keeps operators without results: 2.7's drops them, and no gradient arrives."""
    return required_torch_version(min_version=MIN_TORCH_INDUCTOR)


class DeepCompileHandle:
    """What passes change besides their graph, on all engines of this process."""

    def set_persistent(self, ds_id: int) -> None:
        """Have a sharded parameter stay whole between passes."""
        for params in graph_params.engines():
            if params.has(ds_id):
                params.set_persistent(ds_id)


def get_deepcompile_handle() -> DeepCompileHandle:
    """The handle; defines the operators."""
    graph_ops.define_ops()
    return DeepCompileHandle()


def get_no_copy_ops() -> set[Any]:
    """Operators whose result is a view of their first argument."""
    aten = torch.ops.aten
    return {
        aten.t.default,
        aten.view.default,
        aten.detach.default,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.alias.default,
        aten._unsafe_view.default,
    }


def get_last_uses(graph: Graph) -> tuple[dict[Node, Node], dict[Node, list[Node]]]:
    """For each node its last user, views looked through; and for each user the nodes that it is the last user of.

    A node whose views nobody uses is last used where the last view is made.
    """
    no_copy = get_no_copy_ops()
    last_use: dict[Node, Node] = {}
    owner: dict[Node, Node] = {}
    for node in graph.nodes:
        viewed = _viewed(node, no_copy)
        if viewed is not None:
            owner[node] = owner.get(viewed, viewed)
        for used in node.all_input_nodes:
            last_use[owner.get(used, used)] = node
            last_use[used] = node
    ends: dict[Node, list[Node]] = {}
    for node, user in last_use.items():
        if node not in owner:
            ends.setdefault(user, []).append(node)
    return last_use, ends


def get_real_uses(graph: Graph) -> dict[Node, list[Node]]:
    """For each node its users, views looked through; making a view is no use."""
    no_copy = get_no_copy_ops()
    owner: dict[Node, Node] = {}
    uses: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        viewed = _viewed(node, no_copy)
        if viewed is not None:
            owner[node] = owner.get(viewed, viewed)
            continue
        if node.op != "output":
            for used in node.all_input_nodes:
                uses[owner.get(used, used)].append(node)
    return uses


def _viewed(node: Node, no_copy: set[Any]) -> Node | None:
    if node.op == "call_function" and node.target in no_copy:
        return next(iter(node.all_input_nodes), None)
    return None
