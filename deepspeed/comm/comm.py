# SPDX-License-Identifier: Apache-2.0
"""The public collectives: torch.distributed's signatures, working for one process and for many.

Each takes ``prof``, ``log_name`` and ``debug`` besides: they concern the communication logger only.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import env
from deepspeed.utils.errors import DeepSpeedCommError, explain
from deepspeed.utils.logging import logger

from . import rendezvous
from .backend import SingleBackend
from .profiling import comms_logger, configure, recorded
from .profiling import get_comm_operation_count as get_comm_operation_count
from .profiling import get_logged_comm_ops as get_logged_comm_ops
from .profiling import has_comm_data as has_comm_data
from .profiling import reset_log as reset_log
from .reduce_op import ReduceOp

cdb: Any = None
"""The backend in use; None until the processes are joined."""


class ProcessGroup:
    """A list of ranks with an id: the plain description of a group."""

    def __init__(self, comm_id: int, ranks: Sequence[int] = ()) -> None:
        self.ranks = list(ranks)
        self.comm_id = comm_id
        self.size = len(self.ranks)


# ------------------------------------------------------------------ set-up
def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the processes of the job. A second call does nothing.

    A process without a launcher's variables is a job of its own: its default group is made in
    process, without a port, and works where torch has no distributed at all.

    Args:
        dist_backend: "nccl" or "gloo"; None takes the accelerator's. nccl becomes gloo, with a
            warning, on a machine where NCCL cannot work.
        auto_mpi_discovery: ask mpi4py who we are when MPI started the process.
        distributed_port: where rank 0 listens when MASTER_PORT does not say.
        verbose: log what is done.
        timeout: time limit of collectives; None is DEEPSPEED_TIMEOUT minutes (10).
        init_method: torch's URL of a rendezvous; None is the environment.
        dist_init_required: False asserts that the processes are joined already.
        config: a DeepSpeedConfig, for its communication logger.
        rank: this process's rank, instead of RANK.
        world_size: number of processes, instead of WORLD_SIZE.

    Raises:
        AssertionError: ``dist_init_required`` is False and nothing is initialised.
        DeepSpeedCommError: the processes cannot be joined.
    """
    global cdb
    if config is not None:
        configure(deepspeed_config=config)
    if is_initialized():
        return
    if dist_init_required is False:
        raise AssertionError(
            explain(
                "distributed is not initialised, and dist_init_required=False forbids doing it",
                fix="Call deepspeed.init_distributed() first, or leave dist_init_required out.",
            )
        )
    if rank >= 0 and world_size > 0:
        world = rendezvous.World(rank, world_size)
    else:
        world = rendezvous.discover(auto_mpi_discovery, distributed_port, verbose)
    cdb = _join(world, dist_backend, timeout, init_method, verbose)


def _join(
    world: rendezvous.World,
    dist_backend: str | None,
    timeout: timedelta | None,
    init_method: str | None,
    verbose: bool,
) -> Any:
    """Return the backend of the job: torch's, or the one of a process that cannot have it."""
    if not torch.distributed.is_available():
        if world.size > 1:
            raise DeepSpeedCommError(
                explain(
                    "this build of torch has no distributed package",
                    got=f"WORLD_SIZE={world.size}",
                    expected="one process",
                    fix="Install a torch built with USE_DISTRIBUTED=1.",
                )
            )
        return SingleBackend()
    if dist_backend is None:
        from deepspeed.accelerator import get_accelerator

        dist_backend = get_accelerator().communication_backend_name()
    backend = rendezvous.usable_backend(dist_backend)
    if verbose:
        logger.info("joining %d process(es) with %s", world.size, backend)
    from .torch import TorchBackend

    return TorchBackend(backend, timeout, init_method, world.rank, world.size)


def is_available() -> bool:
    """Say whether collectives can be had: always, for one process at least."""
    return True


def is_initialized() -> bool:
    """Say whether the processes are joined, by us or by the script through torch.distributed."""
    global cdb
    if cdb is not None and not cdb.is_initialized():
        cdb = None
    if cdb is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        from .torch import TorchBackend

        cdb = TorchBackend(torch.distributed.get_backend())
    return cdb is not None


def set_backend() -> None:
    """Take over torch.distributed's state, if it is initialised."""
    is_initialized()


def _backend() -> Any:
    if not is_initialized():
        raise AssertionError(
            explain(
                "the processes are not joined yet",
                fix="Call deepspeed.init_distributed() before the first collective.",
            )
        )
    return cdb


def init_deepspeed_backend(
    ds_backend: str, timeout: timedelta | None = None, init_method: str | None = None
) -> None:
    """Old name of joining with a named backend."""
    init_distributed(ds_backend, timeout=timeout, init_method=init_method)


def destroy_process_group(group: Any | None = None) -> None:
    """Leave a group; None leaves all of them, and `init_distributed` may be called again."""
    global cdb
    backend = _backend()
    backend.destroy_process_group(group)
    if not backend.is_initialized():
        cdb = None


def new_group(ranks: Sequence[int]) -> Any:
    """Make a group of these ranks. Collective over all processes."""
    return _backend().new_group(ranks)


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> Any:
    """Return torch's DeviceMesh of this shape, or None where there is no torch.distributed."""
    backend = _backend()
    if isinstance(backend, SingleBackend):
        return None
    return backend.init_device_mesh(mesh_shape, mesh_dim_names)


def enable_symm_mem_for_group(group_name: str) -> None:
    """Let torch's symmetric memory serve a group (CUDA only)."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group as enable

    enable(group_name)  # type: ignore[arg-type]


# ------------------------------------------------------------------ who is there
def get_rank(group: Any | None = None) -> int:
    """Return this process's rank in the group, -1 outside it."""
    return _backend().get_rank(group)


def get_world_size(group: Any | None = None) -> int:
    """Return the number of processes of the group, -1 outside it."""
    return _backend().get_world_size(group)


def get_local_rank() -> int:
    """Return this process's index on its machine (LOCAL_RANK; 0 when not set)."""
    _backend()
    return env.LOCAL_RANK.get() or 0


def get_global_rank(group: Any | None = None, group_rank: int = 0) -> int:
    """Return the rank in the job of a rank in the group."""
    return group_rank if group is None else _backend().get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """Return the ranks in the job of all members, in the order of the group."""
    return _backend().get_all_ranks_from_group(group)


def get_world_group() -> Any:
    """Return the group of all processes."""
    return _backend().get_world_group()


def get_backend(group: Any = None) -> str:
    """Return the name of the group's backend."""
    return _backend().get_backend(group)


# ------------------------------------------------------------------ communication logger
def log_summary(show_straggler: bool = False, return_dict: bool = False) -> Any:
    """Print what the communication logger recorded. Collective: every rank calls it.

    Args:
        show_straggler: add how long ranks waited for the slowest one.
        return_dict: return the numbers too.
    """
    backend = _backend()
    backend.barrier()
    result = comms_logger.log_all(
        print_log=get_rank() == 0, show_straggler=show_straggler, return_dict=return_dict
    )
    backend.barrier()
    return result


# ------------------------------------------------------------------ reductions
@recorded("all_reduce")
def all_reduce(
    tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduce ``tensor`` over the group, in place, on every rank."""
    return _backend().all_reduce(tensor, op, group, async_op)


@recorded("inference_all_reduce")
def inference_all_reduce(
    tensor: torch.Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """`all_reduce` under the name that inference kernels log."""
    return _backend().all_reduce(tensor, op, group, async_op)


@recorded("all_reduce_coalesced")
def all_reduce_coalesced(
    tensors: Sequence[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce several tensors in place."""
    return _backend().all_reduce_coalesced(tensors, op, group, async_op)


@recorded("reduce")
def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce ``tensor`` onto the rank ``dst``; the others' contents are undefined afterwards."""
    return _backend().reduce(tensor, dst, op, group, async_op)


@recorded("reduce_scatter_tensor")
def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce ``tensor`` over the group; each rank gets its slice in ``output_tensor``."""
    return _backend().reduce_scatter_tensor(output_tensor, tensor, op, group, async_op)


@recorded("reduce_scatter_fn")
def reduce_scatter_fn(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """`reduce_scatter_tensor` under its old name."""
    return _backend().reduce_scatter_tensor(output_tensor, tensor, op, group, async_op)


@recorded("reduce_scatter")
def reduce_scatter(
    output: torch.Tensor,
    input_list: Sequence[torch.Tensor],
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce lists of tensors over the group; the i-th rank gets the i-th sum."""
    return _backend().reduce_scatter(output, input_list, op, group, async_op)


# ------------------------------------------------------------------ copies
@recorded("broadcast")
def broadcast(tensor: torch.Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
    """Copy the tensor of the global rank ``src`` to all ranks of the group."""
    return _backend().broadcast(tensor, src, group, async_op)


@recorded("broadcast_object_list")
def broadcast_object_list(
    object_list: list[Any], src: int, group: Any = None, device: Any = None
) -> None:
    """Copy picklable objects of the global rank ``src`` to all ranks of the group."""
    return _backend().broadcast_object_list(object_list, src, group, device)


@recorded("all_gather")
def all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Collect every rank's tensor in ``tensor_list``."""
    return _backend().all_gather(tensor_list, tensor, group, async_op)


@recorded("all_gather_object")
def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """Collect every rank's picklable object in ``object_list``."""
    return _backend().all_gather_object(object_list, obj, group)


@recorded("all_gather_into_tensor")
def all_gather_into_tensor(
    output_tensor: torch.Tensor, tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Collect every rank's tensor in one tensor, in the order of the group."""
    return _backend().all_gather_into_tensor(output_tensor, tensor, group, async_op)


@recorded("allgather_fn")
def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """`all_gather_into_tensor` under its old name."""
    return _backend().all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


@recorded("all_gather_coalesced")
def all_gather_coalesced(
    output_tensors: Sequence[torch.Tensor],
    input_tensors: Sequence[torch.Tensor],
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Do several `all_gather_into_tensor` at once."""
    return _backend().all_gather_coalesced(output_tensors, input_tensors, group, async_op)


@recorded("all_to_all_single")
def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Exchange slices along the first dimension: the i-th slice goes to the i-th rank."""
    return _backend().all_to_all_single(
        output, tensor, output_split_sizes, input_split_sizes, group, async_op
    )


@recorded("all_to_all")
def all_to_all(
    output_tensor_list: Sequence[torch.Tensor],
    input_tensor_list: Sequence[torch.Tensor],
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Exchange tensors: the i-th of the list goes to the i-th rank."""
    return _backend().all_to_all(output_tensor_list, input_tensor_list, group, async_op)


@recorded("gather")
def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Collect every rank's tensor on the global rank ``dst``."""
    return _backend().gather(tensor, gather_list, dst, group, async_op)


@recorded("scatter")
def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Hand out the list of the global rank ``src``: the i-th tensor to the i-th rank."""
    return _backend().scatter(tensor, scatter_list, src, group, async_op)


# ------------------------------------------------------------------ point to point
@recorded("send")
def send(tensor: torch.Tensor, dst: int, group: Any = None, tag: int = 0) -> None:
    """Send a tensor to a global rank, and wait until it may be overwritten."""
    return _backend().send(tensor, dst, group, tag)


@recorded("recv")
def recv(tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0) -> Any:
    """Receive into a tensor; return the sender's rank."""
    return _backend().recv(tensor, src, group, tag)


@recorded("isend")
def isend(tensor: torch.Tensor, dst: int, group: Any = None, tag: int = 0) -> Any:
    """Begin to send a tensor; return a handle."""
    return _backend().isend(tensor, dst, group, tag)


@recorded("irecv")
def irecv(tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0) -> Any:
    """Begin to receive into a tensor; return a handle."""
    return _backend().irecv(tensor, src, group, tag)


def batch_isend_irecv(p2p_op_list: Sequence[Any]) -> list[Any]:
    """Begin several sends and receives (torch.distributed.P2POp) at once."""
    return _backend().batch_isend_irecv(p2p_op_list)


# ------------------------------------------------------------------ waiting for each other
@recorded("barrier")
def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
    """Wait until every rank of the group is here."""
    return _backend().barrier(group, async_op, device_ids)


@recorded("monitored_barrier")
def monitored_barrier(
    group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
) -> None:
    """A barrier that names the ranks that did not come (gloo)."""
    return _backend().monitored_barrier(group, timeout, wait_all_ranks)


# ------------------------------------------------------------------ what the backends can do
def has_reduce_scatter_tensor() -> bool:
    """True: emulated where the backend has none."""
    return True


def has_all_gather_into_tensor() -> bool:
    """True: emulated where the backend has none."""
    return True


def has_all_reduce_coalesced() -> bool:
    """True: done one by one where the backend has none."""
    return True


def has_coalescing_manager() -> bool:
    """False: coalesced calls are started together, without torch's manager."""
    return False
