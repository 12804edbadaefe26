# SPDX-License-Identifier: Apache-2.0
"""The batch triad: train batch = micro batch x accumulation steps x data-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch

from ..utils.errors import explain
from .config_errors import ConfigAssertionError

_NAMES = {
    "train_batch_size": "Train batch size",
    "train_micro_batch_size_per_gpu": "Micro batch size per gpu",
    "gradient_accumulation_steps": "Gradient accumulation steps",
}


def distributed_rank_and_size() -> tuple[int, int]:
    """Return (rank, world size) of torch.distributed; (0, 1) where it is absent or not initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def data_parallel_size(
    param_sp_size: int | None, mpu: Any = None, mesh_device: Any = None
) -> tuple[int, int]:
    """Return (rank, number of data-parallel ranks).

    Args:
        param_sp_size: ``sequence_parallel_size`` of the configuration.
        mpu: knows the model-parallel groups; one for sequence parallelism may lack the data-parallel size.
        mesh_device: a device mesh with a dimension ``data_parallel``.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) the sequence-parallel size does not divide the ranks.
    """
    rank, world = distributed_rank_and_size()
    if mpu is not None:
        if hasattr(mpu, "get_data_parallel_world_size"):
            return rank, int(mpu.get_data_parallel_world_size())
        return rank, _share(world, int(mpu.get_sequence_parallel_world_size()))
    if mesh_device is not None:
        return rank, int(mesh_device.get_group(mesh_dim="data_parallel").size())
    if param_sp_size is not None:
        return rank, _share(world, param_sp_size)
    return rank, world


def _share(world: int, sequence: int) -> int:
    if world == 1:
        return 1  # parsed outside of a job: the ranks are not there yet
    if sequence < 1 or world % sequence != 0:
        raise ConfigAssertionError(
            explain(
                "the sequence-parallel size does not divide the number of ranks",
                got=f"sequence_parallel_size {sequence} on {world} ranks",
                fix="Choose a divisor of the number of ranks.",
            )
        )
    return world // sequence


def complete_batch(
    train: int | None, micro: int | None, steps: int | None, world: int
) -> tuple[int, int, int]:
    """Derive what was left out of (train batch, micro batch, accumulation steps) and check the three.

    Args:
        train: samples of one optimizer step on all ranks.
        micro: samples of one forward pass on one rank.
        steps: forward passes to one optimizer step.
        world: data-parallel ranks.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) neither batch size is given, one is not above 0, or
            train != micro * steps * world.
    """
    given = dict(zip(_NAMES, (train, micro, steps), strict=True))
    for key, value in given.items():
        if value is not None and value <= 0:
            raise ConfigAssertionError(
                f"{_NAMES[key]}: {value} has to be greater than 0. Correct '{key}'."
            )
    if micro is None:
        if train is None:
            raise ConfigAssertionError(
                "either train_batch_size or train_micro_batch_size_per_gpu needs to be provided: "
                "add one of them to the config."
            )
        steps = 1 if steps is None else steps
        micro = train // world // steps
    elif train is None:
        steps = 1 if steps is None else steps
        train = micro * steps * world
    elif steps is None:
        steps = train // micro // world
    if min(micro, steps) <= 0 or train != micro * steps * world:
        raise ConfigAssertionError(_unequal(train, micro, steps, world, given))
    return train, micro, steps


def _unequal(train: int, micro: int, steps: int, world: int, given: dict[str, int | None]) -> str:
    """Say why the three do not fit, and which train_batch_size would be next to fit."""
    unit = (given["train_micro_batch_size_per_gpu"] or 1) * world
    unit *= given["gradient_accumulation_steps"] or 1
    below, above = train // unit * unit, (train // unit + 1) * unit
    near = f"{below} or {above}" if below and below != train else f"{above}"
    if None not in given.values():
        near = f"{micro * steps * world}"
    alone = (
        f" They fit one rank, and there are {world}: a program that thinks that each is alone may have filled them in. "
        'On CPUs, tell accelerate InitProcessGroupKwargs(backend="gloo"), or the Trainer use_cpu=True.'
    )
    return (
        "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
        f"gradient_acc_step * world_size {train} != {micro} * {steps} * {world}. "
        f"With the other values as they are, train_batch_size could be {near}."
        + (alone if world > 1 and None not in given.values() and train == micro * steps else "")
    )
