# SPDX-License-Identifier: Apache-2.0
"""ZeRO stages 1 and 2 under the name and the attributes that callers know."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils.logging import logger

from .estimate import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)
from .optimizer import ZeroOptimizer
from .plan import TierKind
from .shard_group import ShardGroup

__all__ = [
    "DeepSpeedZeroOptimizer",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
]


class DeepSpeedZeroOptimizer(ZeroOptimizer, ZeROOptimizer):
    """The optimizer wrapper of ZeRO stages 1 and 2; see `ZeroOptimizer`."""

    nccl_start_alignment_factor = 2
    """Each rank's part of a group starts at a multiple of so many elements."""

    def _build_groups(self) -> list[ShardGroup]:
        groups = super()._build_groups()
        for number, group in enumerate(groups):
            logger.info(f"Flattening param group {number} on {group.device} (sufficient memory)")
        return groups

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        """Parameters of each group, in the order in which the user gave them."""
        return [group.client_order for group in self.groups]

    @property
    def round_robin_bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        """Parameters of each group, in flat order."""
        return [group.params for group in self.groups]

    @property
    def bit16_groups_flat(self) -> list[torch.Tensor]:
        """Each group's parameters as one flat tensor, padding included."""
        return [group.param_slab.flat for group in self.groups]

    @property
    def parallel_partitioned_bit16_groups(self) -> list[list[torch.Tensor]]:
        """Each group's flat parameters, one slice a rank."""
        return [[g.param_slab.shard(r) for r in range(g.shard_axis.size)] for g in self.groups]

    @property
    def single_partition_of_fp32_groups(self) -> list[torch.nn.Parameter]:
        """This rank's flat master weights."""
        return [part.master for group in self.groups for part in group.parts]

    @property
    def averaged_gradients(self) -> dict[int, Any]:
        """This rank's reduced gradients on the device by group, None where there are none; empty where they are offloaded."""
        if self.plan.state_tier is not TierKind.DEVICE:
            return {}
        return {number: group.grads() for number, group in enumerate(self.groups)}

    @property
    def accumulated_grads_in_cpu(self) -> dict[int, torch.Tensor]:
        """Offloaded gradients that add up until the next step, by the number of the flat master; empty after it."""
        if self.plan.state_tier is TierKind.DEVICE:
            return {}
        parts = enumerate(self._parts())
        return {number: group.grad_of(part) for number, (group, part) in parts if part.has_grad}

    @property
    def partition_gradients(self) -> bool:
        return self.plan.reduces_each_backward

    @property
    def partition_count(self) -> list[int]:
        """Over how many ranks each group is sharded."""
        return [group.shard_axis.size for group in self.groups]

    @staticmethod
    def get_param_id(param: torch.nn.Parameter) -> int:
        """The key of a parameter in `param_to_partition_ids`."""
        return id(param)

    @property
    def param_to_partition_ids(self) -> list[dict[int, list[int]]]:
        """For each group, the ranks that hold a part of each parameter."""
        return [
            {
                id(param): [segment.rank for segment in group.layout.param_segments(index)]
                for index, param in enumerate(group.params)
            }
            for group in self.groups
        ]

    @property
    def group_paddings(self) -> list[int]:
        return [group.padding for group in self.groups]

    @property
    def dp_process_group(self) -> Any:
        return self.mesh.data.group

    @property
    def real_dp_process_group(self) -> list[Any]:
        return [group.shard_axis.group for group in self.groups]
