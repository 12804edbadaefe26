# SPDX-License-Identifier: Apache-2.0
"""The experts of this rank: copies of one module, each with its own queue of tokens."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Copies of `expert`, applied to one part of dimension 1 each.

    Their params carry `allreduce = False` and `group_name`: gradients are averaged only over the
    ranks that hold the same experts.

    Args:
        expert: module that maps [..., model] to [..., model], or to a tuple that starts with it.
        num_local_experts: number of copies.
        expert_group_name: name of the expert-parallel group, "ep_size_<n>".
    """

    def __init__(
        self, expert: nn.Module, num_local_experts: int = 1, expert_group_name: str | None = None
    ) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(
            copy.deepcopy(expert) for _ in range(num_local_experts)
        )
        self.num_local_experts = num_local_experts
        for param in self.deepspeed_experts.parameters():
            param.allreduce = False
            param.group_name = expert_group_name

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply expert i to part i.

        Args:
            inputs: [expert-parallel ranks, local experts, capacity, model].

        Returns:
            A tensor of the same shape.
        """
        outputs = []
        parts = inputs.chunk(self.num_local_experts, dim=1)
        for part, expert in zip(parts, self.deepspeed_experts, strict=True):
            output = expert(part)
            # an expert may also return a bias, as Megatron's do
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs, dim=1)
