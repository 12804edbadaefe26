# SPDX-License-Identifier: Apache-2.0
"""The operators that passes put into graphs (`torch.ops.dc`): what ZeRO does, as nodes.

[Note: Nodes instead of hooks]
`allgather_param` starts a gather and returns a token; `wait_allgather` takes the token and returns the whole values, a
tensor that is nobody else's. No operator lets go of them: the compiler drops each tensor after its last use, and with it
goes the memory. `reduce_grad` hands a gradient over to the reducer, which starts the collective when a bucket is full,
while the rest of the graph computes; it returns a token, and `end_backward`, which takes all tokens, is what keeps
them from being removed as unused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .graph_params import GraphParams, of_graph

SCHEMAS = {
    "allgather_param": "(Tensor a, int graph_id, int id, ScalarType? dtype=None) -> Tensor",
    "wait_allgather": "(Tensor a, int graph_id, int id) -> Tensor",
    "reduce_grad": "(Tensor a, int graph_id, int id) -> Tensor",
    "end_backward": "(Tensor[] tensors, int graph_id, bool release_reduce_buckets=True) -> ()",
}

_library: torch.library.Library | None = None


def define_ops() -> None:
    """Make `torch.ops.dc`; a second call does nothing."""
    global _library
    if _library is not None:
        return
    library = torch.library.Library("dc", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        real, fake = _IMPLEMENTATIONS[name]
        library.impl(name, real, "CompositeExplicitAutograd")
        library.impl(name, fake, "Meta")
    _library = library
    _keep_impure(torch.ops.dc.end_backward.default)
    _keep_impure(torch.ops.dc.reduce_grad.default, of_compiler=False)


def _keep_impure(op: Any, of_compiler: bool = True) -> None:
    """Have neither fx nor inductor remove an operator whose result nobody uses."""
    torch.fx.node._side_effectful_functions.add(op)
    if of_compiler:
        from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

        _register_effectful_op(op, _EffectType.ORDERED)


def _token(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, dtype=torch.uint8, device=like.device)


def _allgather(
    a: torch.Tensor, graph_id: int, id: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    of_graph(graph_id).start_gather(id)
    return _token(a)


def _allgather_fake(
    a: torch.Tensor, graph_id: int, id: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _token(a)


def _wait(a: torch.Tensor, graph_id: int, id: int) -> torch.Tensor:
    return of_graph(graph_id).finish_gather(id)


def _wait_fake(a: torch.Tensor, graph_id: int, id: int) -> torch.Tensor:
    params: GraphParams = of_graph(graph_id)
    param = params.param(id)
    return torch.empty(param.ds_shape, dtype=param.dtype, device=a.device)


def _reduce(a: torch.Tensor, graph_id: int, id: int) -> torch.Tensor:
    of_graph(graph_id).take_grad(id, a)
    return _token(a)


def _reduce_fake(a: torch.Tensor, graph_id: int, id: int) -> torch.Tensor:
    return _token(a)


def _end_backward(
    tensors: list[torch.Tensor], graph_id: int, release_reduce_buckets: bool = True
) -> None:
    of_graph(graph_id).end_backward()


def _end_backward_fake(
    tensors: list[torch.Tensor], graph_id: int, release_reduce_buckets: bool = True
) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "allgather_param": (_allgather, _allgather_fake),
    "wait_allgather": (_wait, _wait_fake),
    "reduce_grad": (_reduce, _reduce_fake),
    "end_backward": (_end_backward, _end_backward_fake),
}
