# SPDX-License-Identifier: Apache-2.0
"""Which ranks do what in a run: the configuration, a caller's `mpu` or a device mesh, made into a `Mesh`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deepspeed import comm as dist
from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.utils import groups
from deepspeed.utils.errors import explain

from .sharding import zero_axes


def build_mesh(config: Any, mpu: Any, mesh_device: Any = None) -> Mesh:
    """The ranks of this run: from `mpu` where the caller has its own groups, else all ranks are data-parallel."""
    mesh = _sequence_mesh(config, mpu, mesh_device)
    if mpu is not None and hasattr(mpu, "get_data_parallel_group"):
        data = Axis.of_group(mpu.get_data_parallel_group())
        tensor = mesh.tensor
        if mpu.get_model_parallel_world_size() > 1:
            tensor = Axis.of_group(mpu.get_model_parallel_group())
        both = data
        if mesh.sequence.size > 1 and hasattr(mpu, "get_sequence_data_parallel_group"):
            both = Axis.of_group(mpu.get_sequence_data_parallel_group())
        pipe = mesh.pipe
        if hasattr(mpu, "get_pipe_parallel_group") and mpu.get_pipe_parallel_world_size() > 1:
            pipe = Axis.of_group(mpu.get_pipe_parallel_group())
        mesh = replace(mesh, data=data, sequence_data=both, tensor=tensor, pipe=pipe)
    return zero_axes(mesh, config.zero_config)


def _sequence_mesh(config: Any, mpu: Any, mesh_device: Any) -> Mesh:
    """The mesh in force, with the ranks that share a sequence as `mpu` or the configuration wants them."""
    mesh = groups.current_mesh()
    wanted = config.sequence_parallel_size or 1
    if mesh_device is not None:
        wanted = mesh_device.get_group(mesh_dim="sequence_parallel").size()
    if hasattr(mpu, "get_sequence_parallel_world_size"):
        wanted = int(mpu.get_sequence_parallel_world_size())
    if wanted != mesh.sequence.size:
        world = mesh.world
        mesh = Mesh.build(world.size, world.ranks[world.rank], sequence=wanted)
        if wanted > 1:
            groups.set_mesh(mesh)
    if wanted > 1 and hasattr(mpu, "get_sequence_parallel_group"):
        theirs = tuple(dist.get_all_ranks_from_group(mpu.get_sequence_parallel_group()))
        if theirs != mesh.sequence.ranks:
            raise ValueError(
                explain(
                    "the ranks that share a sequence are not neighbours",
                    got=f"{list(theirs)} from mpu.get_sequence_parallel_group()",
                    expected=f"{list(mesh.sequence.ranks)}",
                    fix="number the ranks so that those of one sequence come one after another",
                )
            )
    return mesh
