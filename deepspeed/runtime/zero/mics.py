# SPDX-License-Identifier: Apache-2.0
"""MiCS (arXiv:2205.00119) under the names that callers know: stage 3 whose shards stay within groups of ranks.

All of it is an axis of the mesh; see `Mesh.state_axes`.
"""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.utils.errors import DeepSpeedConfigError, explain

from .config import get_zero_config
from .partition_parameters import Init
from .stage3 import DeepSpeedZeroOptimizer_Stage3


class MiCS_Init(Init):
    """`zero.Init` that cuts parameters over `mics_shard_size` ranks.

    Args:
        module: an existing module to shard at once.
        data_parallel_group: process group whose ranks form the smaller groups; None is all data-parallel ranks.
        sequence_data_parallel_group: older name of it.
        mem_efficient_linear, remote_device, pin_memory, enabled, dtype, mpu: as of `zero.Init`.
        config_dict_or_path: configuration with `zero_optimization.mics_shard_size`.
        config: older name of it.

    Raises:
        DeepSpeedConfigError: the configuration has no `mics_shard_size`, or one that does not divide the ranks.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        sequence_data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ) -> None:
        settings = config_dict_or_path if config_dict_or_path is not None else config
        if enabled:
            _check(settings)
        super().__init__(
            module,
            data_parallel_group,
            mem_efficient_linear,
            remote_device,
            pin_memory,
            settings,
            enabled=enabled,
            dtype=dtype,
            mpu=mpu,
            sequence_data_parallel_group=sequence_data_parallel_group,
        )


def _check(settings: Any) -> None:
    from deepspeed.runtime.config import load_config

    size = -1 if settings is None else get_zero_config(load_config(settings)).mics_shard_size
    if size < 1:
        raise DeepSpeedConfigError(
            explain(
                "MiCS_Init needs to know the size of its groups",
                got="no configuration" if settings is None else f"mics_shard_size {size}",
                expected="config_dict_or_path= with zero_optimization.mics_shard_size of 2 or more",
                fix="add it, or use zero.Init",
            )
        )


class MiCS_Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """The optimizer wrapper of ZeRO stage 3 with `mics_shard_size`; see `ZeroOptimizer`."""
