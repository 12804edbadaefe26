# SPDX-License-Identifier: Apache-2.0
"""ZeRO stage 1 over a bf16 model whose gradients add up in fp32, under the name that callers know."""

from __future__ import annotations

import torch

from deepspeed.comm import flat

from .base_optimizer import ZeROOptimizer
from .zero.optimizer import ZeroOptimizer
from .zero.shard_group import ShardGroup


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
    def fp32_groups_gradients_flat(self) -> list[torch.Tensor]:
        """The reduced gradients of each group, flat, padding included; gathered anew at each look, by all ranks."""
        return [_whole_gradients(group) for group in self.groups]

    @property
    def group_paddings(self) -> list[int]:
        """Padding elements at the end of this rank's shard of each group."""
        return [group.padding for group in self.groups]


def _whole_gradients(group: ShardGroup) -> torch.Tensor:
    with group.grads_in_memory():
        own = torch.cat([group.grad_of(part).float() for part in group.parts]).to(group.device)
    whole = own.new_empty(group.shard_axis.size * own.numel())
    flat.all_gather_into(whole, own, group.shard_axis)
    return whole
