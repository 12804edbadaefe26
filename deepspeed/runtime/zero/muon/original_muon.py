# SPDX-License-Identifier: Apache-2.0
"""Muon under the names of its reference implementation.

That one has a variant of each class that divides the work over ranks. Here the plain ones do the same arithmetic on every
rank, and ZeRO divides it: `deepspeed.initialize` with optimizer type "Muon".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .muon_optimizer import MuonWithAuxAdam, matrix_update, momentum_direction
from .newton_schulz import NS_METHODS, NS_STEPS, orthogonalize

__all__ = [
    "NS_METHODS",
    "Muon",
    "MuonWithAuxAdam",
    "SingleDeviceMuon",
    "SingleDeviceMuonWithAuxAdam",
    "adam_update",
    "muon_update",
    "zeropower_via_gram_newtonschulz",
    "zeropower_via_newtonschulz5",
]


class SingleDeviceMuonWithAuxAdam(MuonWithAuxAdam):
    """`MuonWithAuxAdam` under its other name."""


class SingleDeviceMuon(MuonWithAuxAdam):
    """Muon for matrices alone.

    Args:
        params: parameters of two dimensions or more, or param groups of them.
        lr: learning rate.
        weight_decay: decoupled decay.
        momentum: decay rate of the momentum.
        ns_method: "gram" or "standard".

    Raises:
        ValueError: a parameter of fewer than two dimensions, or another method.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0,
        momentum: float = 0.95,
        ns_method: str = "gram",
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_method": ns_method,
            "use_muon": True,
        }
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        super().__init__({**options, **group} for group in groups)


class Muon(SingleDeviceMuon):
    """`SingleDeviceMuon` under its other name."""


def zeropower_via_newtonschulz5(matrix: Tensor, steps: int = NS_STEPS) -> Tensor:
    """`orthogonalize` by the standard method."""
    return orthogonalize(matrix, steps, "standard")


def zeropower_via_gram_newtonschulz(matrix: Tensor, steps: int = NS_STEPS) -> Tensor:
    """`orthogonalize` by way of the Gram matrix."""
    return orthogonalize(matrix, steps, "gram")


@torch.no_grad()
def muon_update(
    grad: Tensor,
    momentum: Tensor,
    beta: float = 0.95,
    ns_steps: int = NS_STEPS,
    nesterov: bool = True,
    ns_method: str = "gram",
) -> Tensor:
    """Muon's update of one parameter, still to be multiplied by the learning rate and taken off.

    Args:
        grad: at least two dimensions; overwritten.
        momentum: of the same shape; takes the gradient in.
        beta: decay rate of the momentum.
        ns_steps: Newton-Schulz steps.
        nesterov: look ahead by one step of the momentum.
        ns_method: "gram" or "standard".
    """
    return matrix_update(momentum_direction(grad, momentum, beta, nesterov), ns_method, ns_steps)


@torch.no_grad()
def adam_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Adam's update of one parameter at `step` (from 1), still to be multiplied by the learning rate and taken off."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return mean / (square.sqrt() + eps)
