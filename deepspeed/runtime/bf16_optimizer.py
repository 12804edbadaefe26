# SPDX-License-Identifier: Apache-2.0
"""ZeRO stage 1 over a bf16 model whose gradients add up in fp32, under the name that callers know."""

from __future__ import annotations

from .base_optimizer import ZeROOptimizer
from .zero.optimizer import ZeroOptimizer


class BF16_Optimizer(ZeroOptimizer, ZeROOptimizer):
    """ZeRO stage 1 over a bf16 model whose gradients add up in fp32; see `ZeroOptimizer`."""

    saves_padding = True
    """Its checkpoints keep the padding of the flat masters."""

    @property
    def bf16_groups(self) -> list:
        """Parameters of each group."""
        return [group.client_order for group in self.groups]

    @property
    def fp32_groups_flat_partition(self) -> list:
        """This rank's flat master weights."""
        return [part.master for group in self.groups for part in group.parts]

    @property
    def group_paddings(self) -> list[int]:
        """Padding elements at the end of this rank's shard of each group."""
        return [group.padding for group in self.groups]
