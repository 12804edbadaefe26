# SPDX-License-Identifier: Apache-2.0
"""The curvature of the loss, block by block: the greatest eigenvalue of its Hessian, by power iteration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import log_dist


class Eigenvalue:
    """Greatest eigenvalue of each block's part of the Hessian, relative to the greatest of all blocks.

    A block's gradients are differentiated once more along a vector, which is replaced by the outcome until its
    length changes little. The gradients must still know how they came about: `loss.backward(create_graph=True)`.

    Args:
        verbose: log what is found.
        max_iter: most products per block.
        tol: relative change of the eigenvalue at which to stop.
        stability: added to a length before it is divided by.
        gas_boundary_resolution: optimizer steps from one measurement to the next; for the caller.
        layer_name: dotted name of the list of blocks in the module, such as ``bert.encoder.layer``.
        layer_num: number of blocks; 0 for all.

    Raises:
        ValueError: no `layer_name`, or a number below 0.
    """

    def __init__(
        self,
        verbose: bool = False,
        max_iter: int = 100,
        tol: float = 1e-2,
        stability: float = 0.0,
        gas_boundary_resolution: int = 1,
        layer_name: str = "",
        layer_num: int = 0,
    ) -> None:
        if not layer_name or layer_num < 0 or max_iter < 1:
            raise ValueError(
                explain(
                    "eigenvalues are taken of the blocks of a list in the model",
                    got=f"layer_name={layer_name!r}, layer_num={layer_num}, max_iter={max_iter}",
                    expected="the list's dotted name, a number from 0 and one from 1",
                )
            )
        self.verbose, self.max_iter, self.tol = verbose, max_iter, tol
        self.stability, self.gas_boundary_resolution = stability, gas_boundary_resolution
        self.layer_name, self.layer_num = layer_name, layer_num

    def get_layers(self, module: nn.Module) -> list[nn.Module]:
        """The blocks.

        Raises:
            AttributeError: the module has no such list.
        """
        found = list(module.get_submodule(self.layer_name).children())
        return found[: self.layer_num or None]

    def normalize(self, vectors: list[Tensor]) -> list[Tensor]:
        """The vectors as one of length 1; what is not finite becomes 0."""
        length = sum(float(v.double().square().sum()) for v in vectors) ** 0.5 + self.stability
        return [torch.nan_to_num(v / length, 0.0, 0.0, 0.0) for v in vectors]

    def compute_eigenvalue(
        self, module: nn.Module, device: Any = None, scale: float = 1.0
    ) -> dict[int, tuple[float, int]]:
        """Measure each block.

        Args:
            module: the model, after a backward pass with ``create_graph=True``.
            device: ignored: work is done where the gradients are.
            scale: what the loss had been multiplied by.

        Returns:
            ``id(parameter)`` -> (share of the greatest eigenvalue, from 0 to 1; number of the block). Blocks without
            a second derivative count as 1, the most sensitive.
        """
        blocks = [list(block.parameters()) for block in self.get_layers(module)]
        values = [self._of_block(params, scale) for params in blocks]
        greatest = max((abs(value) for value in values), default=0.0)
        if self.verbose:
            log_dist(f"eigenvalues of {len(values)} blocks: {values}", ranks=[0])
        return {
            id(param): (abs(value) / greatest if value and greatest else 1.0, number)
            for number, (params, value) in enumerate(zip(blocks, values, strict=True))
            for param in params
        }

    def _of_block(self, params: list[nn.Parameter], scale: float) -> float:
        """The eigenvalue of one block with the greatest absolute value; 0.0 where there is no curvature."""
        params = [p for p in params if p.grad is not None and p.grad.requires_grad]
        if not params:
            return 0.0
        grads = [param.grad for param in params]
        vector = self.normalize([torch.randn_like(param) for param in params])
        value = 0.0
        for _ in range(self.max_iter):
            derived = torch.autograd.grad(
                grads, params, grad_outputs=vector, retain_graph=True, allow_unused=True
            )
            product = [
                torch.zeros_like(p) if h is None else torch.nan_to_num(h, 0.0, 0.0, 0.0)
                for h, p in zip(derived, params, strict=True)
            ]
            if not any(bool(h.any()) for h in product):
                return 0.0
            last, value = (
                value,
                sum(float((h * v).sum()) for h, v in zip(product, vector, strict=True)),
            )
            vector = self.normalize(product)
            if abs(value - last) < self.tol * abs(value):
                break
        return value / scale


def summary_events(
    block_eigenvalue: Mapping[Any, tuple[float, int]], global_samples: int
) -> list[tuple[str, float, int]]:
    """What monitors are told of the blocks' eigenvalues.

    Args:
        block_eigenvalue: as `Eigenvalue.compute_eigenvalue` returns it, one entry a block or more.
        global_samples: where on the axis.
    """
    return [
        (f"Train/Eigenvalues/ModelBlockParam_{number}", value, global_samples)
        for number, (value, _) in enumerate(block_eigenvalue.values())
    ]
