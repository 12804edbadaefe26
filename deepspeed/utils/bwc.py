# SPDX-License-Identifier: Apache-2.0
"""Questions to a client's mpu by whichever of its old and new method names it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _first(mpu: Any, names: Sequence[str], default: Any) -> Any:
    for name in names:
        method = getattr(mpu, name, None)
        if method is not None:
            return method()
    return default


def bwc_tensor_model_parallel_rank(mpu: Any = None) -> int:
    """Return the tensor-parallel rank; 0 without an mpu."""
    names = (
        "get_tensor_model_parallel_rank",
        "get_slice_parallel_rank",
        "get_model_parallel_rank",
    )
    return _first(mpu, names, 0)


def bwc_tensor_model_parallel_world_size(mpu: Any = None) -> int:
    """Return the tensor-parallel size; 1 without an mpu."""
    names = (
        "get_tensor_model_parallel_world_size",
        "get_slice_parallel_world_size",
        "get_model_parallel_world_size",
    )
    return _first(mpu, names, 1)


def bwc_tensor_model_parallel_group(mpu: Any = None) -> Any:
    """Return the tensor-parallel group; None without an mpu."""
    names = (
        "get_tensor_model_parallel_group",
        "get_slice_parallel_group",
        "get_model_parallel_group",
    )
    return _first(mpu, names, None)


def bwc_pipeline_parallel_world_size(mpu: Any = None) -> int:
    """Return the number of pipeline stages; 1 without an mpu."""
    names = ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")
    return _first(mpu, names, 1)


def bwc_pipeline_parallel_group(mpu: Any = None) -> Any:
    """Return the group of a pipeline's stages; None without an mpu."""
    names = ("get_pipeline_model_parallel_group", "get_pipe_parallel_group")
    return _first(mpu, names, None)
