# SPDX-License-Identifier: Apache-2.0
"""The ranks of sequence-parallel training, as a module that can be passed as `mpu`."""

from __future__ import annotations

from typing import Any

from deepspeed import comm as dist
from deepspeed.comm.mesh import Mesh
from deepspeed.utils import groups
from deepspeed.utils.errors import explain


def initialize_sequence_parallel(sequence_parallel_size: int) -> None:
    """Let `sequence_parallel_size` neighbouring ranks share each sequence from now on. Collective of all ranks.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        DeepSpeedCommError: the size does not divide the number of ranks.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            explain(
                "sequence parallelism needs torch.distributed",
                got="no default process group",
                fix="call deepspeed.init_distributed() first",
            )
        )
    mesh = groups.current_mesh()
    if mesh.sequence.size != sequence_parallel_size:
        groups.set_mesh(
            Mesh.build(dist.get_world_size(), dist.get_rank(), sequence=sequence_parallel_size)
        )


def get_sequence_parallel_group() -> Any:
    """The ranks that share a sequence with this one."""
    return groups.group_of(groups.current_mesh().sequence)


def get_sequence_parallel_world_size() -> int:
    """How many ranks share a sequence."""
    return groups.current_mesh().sequence.size


def get_sequence_parallel_rank() -> int:
    """This rank's place in its sequence."""
    return groups.current_mesh().sequence.rank


def get_sequence_data_parallel_group() -> Any:
    """All ranks that hold the same weights."""
    return groups.group_of(groups.current_mesh().sequence_data)


def get_sequence_data_parallel_world_size() -> int:
    """How many ranks hold the same weights."""
    return groups.current_mesh().sequence_data.size


def get_sequence_data_parallel_rank() -> int:
    """This rank's place among those that hold the same weights."""
    return groups.current_mesh().sequence_data.rank


# Nothing but sequences is split here, so this is the model parallelism that callers ask for.
get_model_parallel_group = get_sequence_parallel_group
get_model_parallel_world_size = get_sequence_parallel_world_size
get_model_parallel_rank = get_sequence_parallel_rank


def get_tensor_model_parallel_group() -> Any:
    """The ranks that share each layer's weights: who counts norms asks for these, as a sequence's ranks hold whole ones."""
    return groups.group_of(groups.current_mesh().tensor)


def get_tensor_model_parallel_world_size() -> int:
    """How many ranks share each layer's weights."""
    return groups.current_mesh().tensor.size


def get_tensor_model_parallel_rank() -> int:
    """This rank's place among those that share each layer's weights."""
    return groups.current_mesh().tensor.rank
