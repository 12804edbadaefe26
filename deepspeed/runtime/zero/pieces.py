# SPDX-License-Identifier: Apache-2.0
"""One step of a torch optimizer over flat slabs, shown to it in pieces that fit a cache.

torch's own optimizers make several passes and several temporaries of each parameter's size. For a slab that holds a
whole model the passes run through main memory and the temporaries are as large as the model; for pieces of it neither
is so. Rules that are elementwise give the same bits either way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Elementwise, and with states that are flat like the parameter or a single number.
_ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
# On a CPU what the rule touches of a piece, temporaries included, stays in a core's cache; a GPU wants full waves.
CPU_PIECE_NUMEL = 128 * 1024
GPU_PIECE_NUMEL = 16 * 1024 * 1024


@contextlib.contextmanager
def in_pieces(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Extent in which `optimizer` sees pieces of its large flat parameters in their place.

    Args:
        optimizer: any optimizer; those whose rule is not known to be elementwise, and parameters that have no state
            yet (their first step makes it), are left as they are.
    """
    if type(optimizer) not in _ELEMENTWISE:
        yield
        return
    cut: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    shown = []
    for group in optimizer.param_groups:
        params: list[torch.Tensor] = []
        for param in group["params"]:
            pieces = _pieces(param, optimizer.state.get(param))
            if pieces:
                cut.append((param, list(pieces)))
                optimizer.state.update(pieces)
                params += pieces
            else:
                params.append(param)
        shown.append(params)
    whole = [group["params"] for group in optimizer.param_groups]
    for group, params in zip(optimizer.param_groups, shown, strict=True):
        group["params"] = params
    try:
        yield
    finally:
        for group, params in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = params
        for param, pieces in cut:
            states = [optimizer.state.pop(piece) for piece in pieces]
            for name, value in states[-1].items():
                if not _is_flat(value, pieces[-1]):
                    optimizer.state[param][name] = value


def _pieces(
    param: torch.Tensor, state: dict[str, Any] | None
) -> dict[torch.Tensor, dict[str, Any]]:
    """Views of `param` with views of its gradient and states; nothing where it is better left whole."""
    most = CPU_PIECE_NUMEL if param.device.type == "cpu" else GPU_PIECE_NUMEL
    numel = param.numel()
    if param.dim() != 1 or numel < 2 * most or param.grad is None or not state:
        return {}
    for value in state.values():
        if value is None or (torch.is_tensor(value) and value.numel() not in (1, numel)):
            return {}
    found: dict[torch.Tensor, dict[str, Any]] = {}
    for start in range(0, numel, most):
        length = min(most, numel - start)
        piece = param.detach().narrow(0, start, length).requires_grad_()
        piece.grad = param.grad.narrow(0, start, length)
        found[piece] = {
            name: value.narrow(0, start, length)
            if _is_flat(value, param)
            else value.clone()
            if torch.is_tensor(value)
            else value
            for name, value in state.items()
        }
    return found


def _is_flat(value: Any, param: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == param.shape
