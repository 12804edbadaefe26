# SPDX-License-Identifier: Apache-2.0
"""A slab: one flat buffer that holds one role (param, grad, master …) of all parameters of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import Layout
from .tiers import Tier


class Slab:
    """The full flat range of a contiguous layout in one buffer, with a view for each parameter.

    Args:
        layout: a contiguous layout.
        shapes: shape of each parameter, in layout order.
        dtype: element type of the buffer.
        tier: where the buffer is allocated.
    """

    def __init__(
        self, layout: Layout, shapes: Sequence[torch.Size], dtype: torch.dtype, tier: Tier
    ) -> None:
        assert not layout.cut_per_param
        self.layout = layout
        self.shapes = tuple(shapes)
        self.flat = tier.alloc(layout.padded_numel, dtype)
        self._views = [
            self.flat.narrow(0, start, numel).view(shape)
            for start, numel, shape in zip(layout.starts, layout.numels, self.shapes, strict=True)
        ]

    def view(self, param: int) -> torch.Tensor:
        """The part of the buffer that holds parameter `param`, in its shape."""
        return self._views[param]

    def shard(self, rank: int) -> torch.Tensor:
        """The slice of the buffer that `rank` owns, 1-D, padding included."""
        return self.flat.narrow(0, rank * self.layout.shard_numel, self.layout.shard_numel)


def store(target: torch.Tensor, values: torch.Tensor, fresh: bool) -> None:
    """Overwrite a run of a slab, or add to it."""
    if fresh:
        target.copy_(values)
    else:
        target.add_(values.to(target.device))
