# SPDX-License-Identifier: Apache-2.0
"""Ranks as a launcher gives them, and the bytes that a collective moves."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.utils import env


def get_local_rank_from_launcher() -> int:
    """Return LOCAL_RANK, or Open MPI's; 0 when neither is set."""
    return env.LOCAL_RANK.get() or env.OMPI_LOCAL_RANK.get() or 0


def get_world_rank_from_launcher() -> int:
    """Return RANK, or Open MPI's; 0 when neither is set."""
    return env.RANK.get() or env.OMPI_RANK.get() or 0


def get_world_size_from_launcher() -> int:
    """Return WORLD_SIZE, or Open MPI's; 1 when neither is set."""
    return env.WORLD_SIZE.get() or env.OMPI_SIZE.get() or 1


def message_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the bytes of the largest tensor, or list of tensors, among a collective's arguments.

    That is what each rank has at the end of a gather and at the start of a reduce-scatter.
    """

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, list | tuple):
            return sum(size(item) for item in value if isinstance(item, torch.Tensor))
        return 0

    return max((size(value) for value in (*args, *kwargs.values())), default=0)
