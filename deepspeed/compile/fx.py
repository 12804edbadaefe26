# SPDX-License-Identifier: Apache-2.0
"""Reading and editing fx graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node


def get_output_node(graph: Graph) -> Node:
    """The output node.

    Raises:
        ValueError: if the graph has none.
    """
    for node in reversed(graph.nodes):
        if node.op == "output":
            return node
    raise ValueError("the graph has no output node")


def outputs_of(graph: Graph) -> list[Any]:
    """What a graph returns: nodes, constants and None."""
    returned = get_output_node(graph).args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def set_outputs(graph: Graph, outputs: Iterable[Any]) -> None:
    """Have a graph return something else."""
    get_output_node(graph).args = (tuple(outputs),)


def find_node_by_name(gm: GraphModule, name: str) -> Node | None:
    """The node of that name; None if there is none."""
    return next((node for node in gm.graph.nodes if node.name == name), None)


def find_node_by_tag(gm: GraphModule, tag: str) -> Node | None:
    """The input whose tensor has the attribute `tag` with that value; None if there is none."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta.get("tensor_dict", {}).get("tag") == tag:
            return node
    return None


def get_node_shape_meta(node: Node) -> torch.Tensor | None:
    """The fake tensor that tells a node's shape; None if nobody traced it."""
    return node.meta.get("val", node.meta.get("example_value"))


def replace_node_users(node: Node, new: Node, exclude: Iterable[Node] = ()) -> None:
    """Have all users of `node` but `exclude` (and `new` itself) use `new`."""
    keep = {new, *exclude}
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep)


def positions(graph: Graph) -> dict[Node, int]:
    """Where each node stands."""
    return {node: at for at, node in enumerate(graph.nodes)}


def first_of(nodes: Iterable[Node], order: dict[Node, int]) -> Node:
    """The one that stands first."""
    return min(nodes, key=order.__getitem__)


def after(graph: Graph, node: Node) -> Node:
    """The node before which something that uses `node` can stand: its next one, behind all inputs."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def add_node_before(graph: Graph, place: Node, op: Any, args: tuple[Any, ...], name: str) -> Node:
    """A new call of an operator."""
    with graph.inserting_before(place):
        return graph.create_node("call_function", op, args, {}, name=name)


def nbytes(node: Node) -> int:
    """Bytes of a node's tensors, where their shapes are known; symbolic sizes count as what they were when traced."""
    found = get_node_shape_meta(node)
    several = found if isinstance(found, (tuple, list)) else [found]
    return sum(
        int(tensor.numel()) * tensor.element_size()
        for tensor in several
        if isinstance(tensor, torch.Tensor)
    )


def nodes_calling(graph: Graph, op: Any) -> list[Node]:
    """All calls of an operator, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target == op]


def add_end_backward(graph: Graph, graph_id: int) -> None:
    """Put the node that ends a backward graph behind all nodes that hand gradients over."""
    reduces = nodes_calling(graph, torch.ops.dc.reduce_grad.default)
    args = (reduces, graph_id, True)
    add_node_before(
        graph, get_output_node(graph), torch.ops.dc.end_backward.default, args, "end_backward"
    )


def replace_reduce_outputs_with_none(graph: Graph) -> None:
    """Return None in place of gradients that have been handed over: autograd has nothing to do for them."""
    reduces = set(nodes_calling(graph, torch.ops.dc.reduce_grad.default))
    set_outputs(graph, [None if out in reduces else out for out in outputs_of(graph)])


def token_like(node: Node) -> torch.Tensor | None:
    """The fake tensor of a token on the device of a node's tensor."""
    value = get_node_shape_meta(node)
    return None if value is None else value.new_empty(1, dtype=torch.uint8)


def finish(gm: GraphModule) -> None:
    """An edit is complete: check the graph and make its code."""
    gm.graph.lint()
    gm.recompile()
