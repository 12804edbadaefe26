# SPDX-License-Identifier: Apache-2.0
"""Old names of the process groups, over one current `Mesh`.

Where an axis has one rank but the job has several, the getters return a real group of that one rank:
torch takes None for "everybody".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from deepspeed.comm.mesh import Axis, Mesh, expert_grid, grid, process_group

from .errors import DeepSpeedCommError, explain
from .exceptions import DeprecatedException

mpu: Any = None
"""The client's model-parallel unit, whose answers win over the mesh's."""

mesh_device: Any = None
"""torch's DeviceMesh, when the configuration makes one."""

_mesh: Mesh | None = None
_mesh_under: Any = None
_expert_sizes: list[int] = []
_expert_tensor: list[int] = []
_solo: dict[Any, Any] = {}
_clone: dict[Any, Any] = {}
_tensor_override: dict[str, int] = {}


# ------------------------------------------------------------------ the current mesh
def _default_group() -> Any:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def current_mesh() -> Mesh:
    """Return the mesh in force: all ranks data-parallel, until `set_mesh` says otherwise. Collective
    at its first call."""
    global _mesh, _mesh_under
    world = _default_group()
    if _mesh is None or _mesh_under is not world:
        reset()
        if world is None:
            _mesh = Mesh.single()
        else:
            _mesh = Mesh.build(dist.get_world_size(), dist.get_rank())
        _mesh_under = world
    return _mesh


def set_mesh(mesh: Mesh) -> None:
    """Make ``mesh`` the one that the getters answer from."""
    global _mesh, _mesh_under
    reset()
    _mesh, _mesh_under = mesh, _default_group()


def reset() -> None:
    """Forget the mesh, and everything made under it."""
    global _mesh, _mesh_under, mesh_device
    _mesh = _mesh_under = mesh_device = None
    for cache in (_expert_sizes, _expert_tensor, _solo, _clone, _tensor_override):
        cache.clear()


def group_of(axis: Axis) -> Any:
    """Return a real process group for an axis; None where there is no torch.distributed."""
    if axis.group is not None:
        return axis.group
    world = _default_group()
    if world is None or dist.get_world_size() == 1:
        return world
    if "self" not in _solo:
        # only its member takes part in making it, so it can be made at any time
        _solo["self"] = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return _solo["self"]


def _of_mpu(method: str) -> Any:
    """Return the client's answer, or None when there is no mpu or it does not know."""
    found = getattr(mpu, method, None)
    return found() if callable(found) else None


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Raise: expert groups are made by the MoE layers.

    Raises:
        DeprecatedException: always.
    """
    raise DeprecatedException(
        explain(
            "groups.initialize() is not used any more", fix="Give ep_size to the MoE layer instead."
        )
    )


# ------------------------------------------------------------------ data parallel
def _get_data_parallel_group() -> Any:
    found = _of_mpu("get_data_parallel_group")
    return found if found is not None else group_of(current_mesh().data)


def _get_data_parallel_group_ranks() -> Any:
    return dist.get_process_group_ranks(_get_data_parallel_group())


def _get_data_parallel_world_size() -> int:
    found = _of_mpu("get_data_parallel_world_size")
    return current_mesh().data.size if found is None else found


def _get_data_parallel_rank() -> int:
    found = _of_mpu("get_data_parallel_rank")
    return current_mesh().data.rank if found is None else found


def _get_broadcast_src_rank() -> int:
    return current_mesh().sequence_data.ranks[0]


def _clone_world_group() -> Any:
    """Return a second group of all ranks: its collectives do not mix with the first one's."""
    world = _default_group()
    if world is not None and "world" not in _clone:
        _clone["world"] = dist.new_group(list(range(dist.get_world_size())))
    return _clone.get("world")


def _get_local_all_to_all_group() -> dict[str, Any]:
    """Return the groups of the two-level all-to-all: one machine here, so all ranks are local."""
    return {"local_0": _clone_world_group()}


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_rank = _get_data_parallel_rank
get_data_parallel_world_size = _get_data_parallel_world_size


# ------------------------------------------------------------------ tensor (model) parallel
def _create_model_parallel(model_parallel_size_: int) -> tuple[Any, Any]:
    """Make adjacent ranks model-parallel; return the data- and the model-parallel group."""
    set_mesh(Mesh.build(_world_size(), _world_rank(), tensor=model_parallel_size_))
    return _get_data_parallel_group(), _get_model_parallel_group()


def _init_tp_mesh_device(
    tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None
) -> tuple[Any, Any]:
    """Make adjacent ranks tensor-parallel; return the data- and the tensor-parallel group.

    Raises:
        DeepSpeedCommError: the sizes do not make up the number of processes.
    """
    world = _world_size()
    if data_parallel_size is not None and data_parallel_size * tensor_model_parallel_size != world:
        raise DeepSpeedCommError(
            explain(
                "tensor- and data-parallel sizes do not make up the job",
                got=f"{tensor_model_parallel_size} x {data_parallel_size}",
                expected=f"{world} processes",
            )
        )
    if current_mesh().tensor.size != tensor_model_parallel_size:
        set_mesh(Mesh.build(world, _world_rank(), tensor=tensor_model_parallel_size))
    return get_data_parallel_group(), get_tensor_model_parallel_group()


def get_tensor_model_parallel_group() -> Any:
    """Return the group of ranks that share each layer's weights."""
    for method in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        found = _of_mpu(method)
        if found is not None:
            return found
    return group_of(current_mesh().tensor)


def get_tensor_model_parallel_world_size() -> int:
    """Return the number of ranks that share each layer's weights."""
    if "size" in _tensor_override:
        return _tensor_override["size"]
    for method in ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"):
        found = _of_mpu(method)
        if found is not None:
            return found
    return current_mesh().tensor.size


def get_tensor_model_parallel_rank() -> int:
    """Return this process's index among the ranks that share each layer's weights."""
    if "rank" in _tensor_override:
        return _tensor_override["rank"]
    for method in ("get_tensor_model_parallel_rank", "get_model_parallel_rank"):
        found = _of_mpu(method)
        if found is not None:
            return found
    return current_mesh().tensor.rank


def get_tensor_model_parallel_src_rank() -> int:
    """Return the global rank of the first of the ranks that share each layer's weights."""
    return _world_rank() - get_tensor_model_parallel_rank()


def set_tensor_model_parallel_world_size(world_size: int) -> None:
    """Make the getter answer ``world_size``."""
    _tensor_override["size"] = world_size


def set_tensor_model_parallel_rank(rank: int) -> None:
    """Make the getter answer ``rank``."""
    _tensor_override["rank"] = rank


_get_model_parallel_group = get_model_parallel_group = get_tensor_model_parallel_group
_get_model_parallel_rank = get_model_parallel_rank = get_tensor_model_parallel_rank
_get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_world_size = get_tensor_model_parallel_world_size


# ------------------------------------------------------------------ sequence parallel
def _get_sequence_parallel_world_size() -> int:
    found = _of_mpu("get_sequence_parallel_world_size")
    return current_mesh().sequence.size if found is None else found


def _get_sequence_parallel_rank() -> int:
    found = _of_mpu("get_sequence_parallel_rank")
    return current_mesh().sequence.rank if found is None else found


def _get_sequence_parallel_group() -> Any:
    found = _of_mpu("get_sequence_parallel_group")
    return found if found is not None else group_of(current_mesh().sequence)


def _get_sequence_data_parallel_world_size() -> int:
    found = _of_mpu("get_sequence_data_parallel_world_size")
    return current_mesh().sequence_data.size if found is None else found


def _get_sequence_data_parallel_rank() -> int:
    found = _of_mpu("get_sequence_data_parallel_rank")
    return current_mesh().sequence_data.rank if found is None else found


def _get_sequence_data_parallel_group() -> Any:
    found = _of_mpu("get_sequence_data_parallel_group")
    return found if found is not None else group_of(current_mesh().sequence_data)


# ------------------------------------------------------------------ expert parallel
def _create_expert_and_data_parallel(
    expert_parallel_size_: int,
    mp_size: int | None = None,
    pp_size: int | None = None,
    mp_mode: str = "tp",
    use_data_before_expert_parallel_: bool = False,
    folding_spec: Any = None,
) -> None:
    """Make the groups ``ep_size_<n>`` of a number of ranks that share experts. Collective.

    Args:
        expert_parallel_size_: the number of ranks.
        mp_size: ranks that share a sequence (`mp_mode` "sp"), or each layer's weights (then with `folding_spec`).
        pp_size: pipeline stages; 1.
        mp_mode: "sp" or "tp".
        use_data_before_expert_parallel_: put ranks with the same experts on adjacent ranks.
        folding_spec: experts are spread over tensor-parallel ranks as well.

    Raises:
        DeepSpeedCommError: the size does not divide the ranks.
        NotImplementedError: pipeline stages, or tensor parallelism without `folding_spec`.
    """
    if (pp_size or 1) > 1 or ((mp_size or 1) > 1 and mp_mode == "tp" and folding_spec is None):
        raise NotImplementedError(
            explain(
                "expert parallelism together with tensor or pipeline parallelism is not built yet"
            )
        )
    mesh = current_mesh()
    if mp_mode == "sp" and (mp_size or 1) != mesh.sequence.size:
        set_mesh(Mesh.build(_world_size(), _world_rank(), sequence=mp_size or 1))
        mesh = current_mesh()
    if folding_spec is not None:
        mesh = replace(mesh, tensor=Axis.alone(_world_rank()))  # all ranks of the job in one row
    _add_expert_axes(expert_parallel_size_, mesh, use_data_before_expert_parallel_)


def _create_expert_data_and_model_parallel(
    expert_parallel_size_: int, mpu: Any, use_data_before_expert_parallel_: bool = False
) -> None:
    """Make expert groups among the ranks that hold the same part of a layer, for experts that are themselves
    tensor-parallel. Collective.

    Args:
        expert_parallel_size_: the number of ranks that share experts.
        mpu: the client's tensor-parallel groups; their ranks must be neighbours.
        use_data_before_expert_parallel_: put ranks with the same experts on adjacent ranks.

    Raises:
        DeepSpeedCommError: the tensor-parallel ranks are not neighbours, or the size does not divide the others.
    """
    mesh, size = current_mesh(), int(mpu.get_model_parallel_world_size())
    if size > 1:
        tensor = Axis.of_group(mpu.get_model_parallel_group())
        first = _world_rank() // size * size
        if tensor.ranks != tuple(range(first, first + size)):
            raise DeepSpeedCommError(
                explain(
                    "tensor-parallel experts need tensor-parallel ranks that are neighbours",
                    got=list(tensor.ranks),
                    expected=list(range(first, first + size)),
                )
            )
        mesh = replace(mesh, tensor=tensor)
    _add_expert_axes(expert_parallel_size_, mesh, use_data_before_expert_parallel_)
    _expert_tensor[:] = [size]


def _add_expert_axes(size: int, mesh: Mesh, data_first: bool) -> None:
    global _mesh
    name, present = f"ep_size_{size}", current_mesh()
    if name in present.expert:
        return
    within, across = mesh.expert_axes(size, data_first)
    _mesh = replace(
        present,
        expert={**present.expert, name: within},
        expert_data={**present.expert_data, name: across},
    )
    _expert_sizes.append(size)


def _expert(name: str) -> Axis:
    mesh = current_mesh()
    if name not in mesh.expert:
        raise AssertionError(
            explain(
                "expert parallel group is not initialized",
                got=name,
                expected=f"one of {sorted(mesh.expert)}",
            )
        )
    return mesh.expert[name]


def _expert_data(name: str) -> Axis:
    _expert(name)
    return current_mesh().expert_data[name]


def _get_max_expert_size() -> int:
    if not _expert_sizes:
        raise AssertionError(explain("no expert parallel group was made yet"))
    return max(_expert_sizes)


def _get_max_expert_size_name() -> str:
    return f"ep_size_{_get_max_expert_size()}"


def _get_max_expert_parallel_group() -> Any:
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_expert_parallel_ranks(
    world_size: int,
    tensor_parallel_size_: int,
    expert_parallel_size_: int,
    pipeline_parallel_size_: int = 1,
    use_data_before_expert_parallel_: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """The global ranks of each expert-parallel and each expert-data-parallel group, in a job of any shape.

    Neighbours in a data-parallel group share experts; with the last argument, neighbours hold the same ones.

    Raises:
        DeepSpeedCommError: the sizes do not divide the ranks.
    """
    data = grid(world_size, tensor=tensor_parallel_size_, pipe=pipeline_parallel_size_)["data"]
    spread, copies = expert_grid(data, expert_parallel_size_, use_data_before_expert_parallel_)
    return [list(ranks) for ranks in spread], [list(ranks) for ranks in copies]


def _get_expert_parallel_group(group_name: str) -> Any:
    return group_of(_expert(group_name))


def _get_expert_parallel_group_ranks(group_name: str) -> list[int]:
    return list(_expert(group_name).ranks)


def _get_expert_parallel_group_dict() -> dict[str, Any]:
    return {name: group_of(axis) for name, axis in current_mesh().expert.items()}


def _get_expert_parallel_world_size(group_name: str) -> int:
    return _expert(group_name).size


def _get_expert_parallel_rank(group_name: str) -> int:
    return _expert(group_name).rank


def _get_expert_parallel_src_rank(group_name: str) -> int:
    return _expert(group_name).ranks[0]


def _get_expert_data_parallel_group(group_name: str) -> Any:
    return group_of(_expert_data(group_name))


def _get_expert_data_parallel_group_ranks(group_name: str) -> list[int]:
    return list(_expert_data(group_name).ranks)


def _get_expert_data_parallel_group_dict() -> dict[str, Any]:
    return {name: group_of(axis) for name, axis in current_mesh().expert_data.items()}


def _get_expert_data_parallel_world_size(group_name: str) -> int:
    return _expert_data(group_name).size


def _get_expert_data_parallel_rank(group_name: str) -> int:
    return _expert_data(group_name).rank


def _get_expert_broadcast_src_rank(group_name: str) -> int:
    return _expert_data(group_name).ranks[0]


def _get_expert_model_parallel_world_size() -> int:
    """Over how many ranks each expert's weights are spread."""
    return _expert_tensor[0] if _expert_tensor else 1


# ------------------------------------------------------------------ a smaller axis for ZeRO's params
_zero_param: dict[Any, Axis] = {}


def _create_zero_param_parallel_group(group_size: int) -> None:
    """Make groups of ``group_size`` adjacent ranks that hold a second copy of the params' shards.

    Raises:
        DeepSpeedCommError: the size does not divide the number of processes.
    """
    world, rank = _world_size(), _world_rank()
    if group_size < 1 or world % group_size:
        raise DeepSpeedCommError(
            explain(
                "zero_hpz_partition_size does not divide the number of processes",
                got=group_size,
                expected=f"a divisor of {world}",
            )
        )
    own = Axis.alone(rank)
    for start in range(0, world, group_size):
        ranks = tuple(range(start, start + group_size))
        group = process_group(ranks) if group_size > 1 else None
        if rank in ranks:
            own = Axis(group, group_size, rank - start, ranks)
    _zero_param[_default_group()] = own


def _zero_param_parallel_is_initialized() -> bool:
    return _default_group() in _zero_param


def _get_zero_param_intra_parallel_group() -> Any:
    own = _zero_param.get(_default_group())
    return None if own is None else group_of(own)


def _get_zero_param_intra_parallel_rank_in_mygroup() -> int:
    return _zero_param[_default_group()].rank


def _get_zero_param_intra_parallel_group_world_size() -> int:
    return _zero_param[_default_group()].size


def _get_zero_param_intra_parallel_group_ranks() -> list[int]:
    return list(_zero_param[_default_group()].ranks)


def _world_size() -> int:
    return dist.get_world_size() if _default_group() is not None else 1


def _world_rank() -> int:
    return dist.get_rank() if _default_group() is not None else 0
