# SPDX-License-Identifier: Apache-2.0
"""A second copy of a sharded parameter, near by.

[Note: Second copy]
With hpZ (ZeRO++, arXiv:2306.10209) neighbours share a second copy of each parameter. Whenever a parameter has been
gathered from all ranks, each rank keeps its part for the neighbours; gathers inside a backward pass then ask only these.
They give what the last gather from all ranks gave, which the forward pass made, so that both passes see equal weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspeed.comm.mesh import Axis


@dataclass
class SecondCopy:
    """This rank's part of a copy that neighbours share.

    Attributes:
        axis: the neighbours.
        part: flat, in the parameter's dtype.
        ready: whether it holds what the last gather from all ranks gave.
    """

    axis: Axis
    part: torch.Tensor
    ready: bool = False

    def take(self, values: torch.Tensor) -> None:
        """Keep the own part of whole values."""
        own = values.detach().reshape(-1)[self.axis.rank * self.part.numel() :][: self.part.numel()]
        self.part[: own.numel()].copy_(own)
        self.ready = True
