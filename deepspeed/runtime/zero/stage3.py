# SPDX-License-Identifier: Apache-2.0
"""ZeRO stage 3 under the name and the attributes that callers know."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.runtime.base_optimizer import ZeROOptimizer

from .estimate import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from .optimizer import ZeroOptimizer
from .parameter_offload import DeepSpeedZeRoOffload

__all__ = [
    "DeepSpeedZeroOptimizer_Stage3",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]


class DeepSpeedZeroOptimizer_Stage3(ZeroOptimizer, ZeROOptimizer):
    """The optimizer wrapper of ZeRO stage 3; see `ZeroOptimizer`."""

    parameter_offload: DeepSpeedZeRoOffload

    @property
    def fp16_groups(self) -> list[list[torch.nn.Parameter]]:
        """Parameters of each group."""
        return [group.params for group in self.groups]

    @property
    def fp16_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """This rank's slices of each group's parameters, as one flat tensor."""
        return [group.own for group in self.groups]

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.nn.Parameter]:
        """This rank's flat master weights."""
        return [part.master for group in self.groups for part in group.parts]

    @property
    def averaged_gradients(self) -> dict[int, Any]:
        """This rank's reduced gradients by group; None where there are none."""
        return {i: [part.grad for part in group.parts] for i, group in enumerate(self.groups)}

    @property
    def persistent_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters small enough to stay whole between steps."""
        return self.parameter_offload.persistent_parameters

    @property
    def partition_count(self) -> int:
        """Over how many ranks states are sharded."""
        return self.groups[0].shard_axis.size

    @property
    def dp_process_group(self) -> Any:
        """The data-parallel process group."""
        return self.mesh.data.group

    def empty_partition_cache(self) -> None:
        """Let go of everything that is whole."""
        self.parameter_offload.empty_partition_cache()

    def update_lp_params(self) -> None:
        """Write the master weights into the model."""
        super().update_lp_params()
        self.parameter_offload.residency.after_step()
