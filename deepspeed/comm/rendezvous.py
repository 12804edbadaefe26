# SPDX-License-Identifier: Apache-2.0
"""How the processes of a job find each other: from a launcher's environment, from MPI, or alone."""

from __future__ import annotations

import atexit
import importlib.util
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch

from deepspeed.utils import env
from deepspeed.utils.errors import DeepSpeedCommError, explain
from deepspeed.utils.logging import logger, warning_once

# variables that an MPI or Slurm job step sets on each process
_MPI_SIZES = (env.OMPI_SIZE, env.PMI_SIZE, env.MV2_SIZE, env.SLURM_STEP_NUM_TASKS)
# rank, size and local rank, where a launcher of that kind tells all three
_TOLD = (
    (env.OMPI_RANK, env.OMPI_SIZE, env.OMPI_LOCAL_RANK),
    (env.MV2_RANK, env.MV2_SIZE, env.MV2_LOCAL_RANK),
    (env.SLURM_PROCID, env.SLURM_STEP_NUM_TASKS, env.SLURM_LOCALID),
)
_REQUIRED = (env.RANK, env.WORLD_SIZE, env.MASTER_ADDR, env.MASTER_PORT, env.LOCAL_RANK)


@dataclass(frozen=True)
class World:
    """What a process knows of its job: its rank and the number of processes."""

    rank: int
    size: int


def default_timeout() -> timedelta:
    """Return the time limit of process groups: DEEPSPEED_TIMEOUT minutes, 10 by default."""
    return timedelta(minutes=env.DEEPSPEED_TIMEOUT.get())


def in_aml() -> bool:
    """Say whether this is an Azure ML job."""
    return env.AZUREML_EXPERIMENT_ID.is_set()


def in_aws_sm() -> bool:
    """Say whether this is an Amazon SageMaker job."""
    return env.SM_TRAINING_ENV.is_set()


def in_dlts() -> bool:
    """Say whether this is a DLTS job."""
    return env.DLTS_JOB_ID.is_set()


def discover(auto_mpi_discovery: bool, port: int, verbose: bool) -> World:
    """Find rank and size, and complete the environment that scripts read afterwards.

    Args:
        auto_mpi_discovery: ask mpi4py when an MPI launch is recognised.
        port: where rank 0 will listen when the environment does not say.
        verbose: log what was found.

    Raises:
        DeepSpeedCommError: the environment says that there are several processes, but not
            everything that is needed to join them.
    """
    missing = [variable.name for variable in _REQUIRED if not variable.is_set()]
    if missing and auto_mpi_discovery:
        if in_aml() and _mpi_launched():
            patch_aml_env_for_torch_nccl_backend(verbose=verbose)
        elif in_aws_sm() and _mpi_launched():
            patch_aws_sm_env_for_torch_nccl_backend(verbose=verbose)
        elif _mpi_launched() and not (env.RANK.is_set() and env.WORLD_SIZE.is_set()):
            mpi_discovery(port, verbose)
        missing = [variable.name for variable in _REQUIRED if not variable.is_set()]
    size = env.WORLD_SIZE.get()
    if size is None and env.RANK.get() is None and _mpi_launched():
        raise DeepSpeedCommError(
            explain(
                "MPI started several processes, but nothing says which one this is",
                got="auto_mpi_discovery=False and no RANK",
                fix="Set RANK, WORLD_SIZE and the rest, or call init_distributed() with "
                "auto_mpi_discovery=True (needs mpi4py).",
            )
        )
    if size == 1 or (size is None and env.RANK.get() is None):
        _alone(port, verbose)
        return World(0, 1)
    if missing:
        raise DeepSpeedCommError(
            explain(
                "the environment describes a job of several processes, but not completely",
                got=f"missing {', '.join(missing)}",
                expected=", ".join(variable.name for variable in _REQUIRED),
                fix="Start the script with the deepspeed launcher (or torchrun), or unset RANK and "
                "WORLD_SIZE to run one process.",
            )
        )
    rank = env.RANK.get()
    assert rank is not None and size is not None
    if not 0 <= rank < size:
        raise DeepSpeedCommError(
            explain("impossible rank", got=f"RANK={rank}", expected=f"0 to {size - 1} (WORLD_SIZE)")
        )
    return World(rank, size)


def _alone(port: int, verbose: bool) -> None:
    """Describe a job of one process in the environment: scripts read these variables."""
    for variable, value in (
        (env.RANK, 0),
        (env.LOCAL_RANK, 0),
        (env.WORLD_SIZE, 1),
        (env.MASTER_ADDR, "127.0.0.1"),
        (env.MASTER_PORT, port),
    ):
        if not variable.is_set():
            variable.set(value)
    if verbose:
        logger.info("one process: the default group is made in process")


def _mpi_launched() -> bool:
    return any((size.get() or 1) > 1 for size in _MPI_SIZES)


def mpi_discovery(distributed_port: int = 29500, verbose: bool = True) -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as MPI or Slurm has numbered us.

    Where the environment tells the numbers and MASTER_ADDR is set (the deepspeed launcher sets it),
    that is all; else mpi4py is asked, which is collective.

    Raises:
        DeepSpeedCommError: mpi4py is needed and not installed, or variables set already contradict MPI.
    """
    numbers = _told_numbers()
    if numbers is not None and env.MASTER_ADDR.is_set():
        _take(numbers, distributed_port, verbose)
        return
    if importlib.util.find_spec("mpi4py") is None:
        raise DeepSpeedCommError(
            explain(
                "this process was started by MPI, but mpi4py is not installed",
                fix="pip install mpi4py, or set MASTER_ADDR, or start the script with the deepspeed "
                "launcher, which does.",
            )
        )
    from mpi4py import MPI  # type: ignore[import-not-found]

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = world.bcast(socket.gethostbyname(socket.gethostname()), root=0)
    if not env.MASTER_ADDR.is_set():
        env.MASTER_ADDR.set(address)
    _take((world.Get_rank(), world.Get_size(), local.Get_rank()), distributed_port, verbose)


def _told_numbers() -> tuple[int, int, int] | None:
    """Return rank, size and local rank from the variables of a job of several processes, if all are there."""
    for names in _TOLD:
        rank, size, local = (name.get() for name in names)
        if rank is not None and local is not None and size is not None and size > 1:
            return rank, size, local
    return None


def _take(numbers: tuple[int, int, int], port: int, verbose: bool) -> None:
    """Write the numbers to the environment; what is there must agree."""
    for variable, value in zip((env.RANK, env.WORLD_SIZE, env.LOCAL_RANK), numbers, strict=True):
        if variable.is_set() and variable.get() != value:
            raise DeepSpeedCommError(
                explain(
                    f"{variable.name} contradicts MPI",
                    got=variable.raw(),
                    expected=str(value),
                    fix=f"Unset {variable.name}.",
                )
            )
        variable.set(value)
    if not env.MASTER_PORT.is_set():
        env.MASTER_PORT.set(port)
    if verbose:
        logger.info("MPI: %s", {variable.name: variable.raw() for variable in _REQUIRED})


def patch_aml_env_for_torch_nccl_backend(master_port: int = 6105, verbose: bool = True) -> None:
    """Translate an Azure ML (Open MPI) job's variables to torch's names."""
    _from_open_mpi()
    node = env.AZ_BATCH_MASTER_NODE.get()
    if node and env.OMPI_SIZE.get() != env.OMPI_LOCAL_SIZE.get():
        address, _, port = node.partition(":")
        env.MASTER_ADDR.set(address)
        if not env.MASTER_PORT.is_set():
            env.MASTER_PORT.set(port or master_port)
    else:
        env.MASTER_ADDR.set(env.AZ_BATCHAI_MPI_MASTER_NODE.get() or "127.0.0.1")
        env.MASTER_PORT.set(54965)
    if verbose:
        logger.info("Azure ML: %s", {variable.name: variable.raw() for variable in _REQUIRED})


def patch_aws_sm_env_for_torch_nccl_backend(verbose: bool = True) -> None:
    """Translate an Amazon SageMaker (Open MPI) job's variables to torch's names."""
    _from_open_mpi()
    if verbose:
        logger.info("SageMaker: %s", {variable.name: variable.raw() for variable in _REQUIRED})


def _from_open_mpi() -> None:
    for ours, theirs in (
        (env.RANK, env.OMPI_RANK),
        (env.LOCAL_RANK, env.OMPI_LOCAL_RANK),
        (env.WORLD_SIZE, env.OMPI_SIZE),
    ):
        if theirs.is_set():
            ours.set(theirs.get())


def usable_backend(backend: str) -> str:
    """Return the backend to use where ``backend`` was asked for: gloo when NCCL cannot work here."""
    if backend != "nccl":
        return backend
    dist = torch.distributed
    if torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available():
        return backend
    why = "torch has no NCCL" if torch.cuda.is_available() else "there is no CUDA device"
    warning_once(f"backend nccl was asked for, but {why} on this machine: using gloo")
    return "gloo"


def join(
    backend: str,
    world: World,
    timeout: timedelta,
    init_method: str | None,
) -> None:
    """Make torch's default process group.

    One process gets a store in its own memory: no port, no rendezvous.

    Raises:
        DeepSpeedCommError: the processes could not be joined.
    """
    dist = torch.distributed
    options: dict[str, Any] = {"backend": backend, "timeout": timeout}
    if world.size == 1 and init_method is None:
        dist.init_process_group(store=_own_store(), rank=0, world_size=1, **options)
        return
    atexit.unregister(_let_threads_finish)
    atexit.register(_let_threads_finish)
    if sys.platform == "win32":
        env.USE_LIBUV.set(0)  # torch's Windows builds are made without libuv
    else:
        _choose_gloo_interface()
    try:
        dist.init_process_group(
            init_method=init_method or "env://", rank=world.rank, world_size=world.size, **options
        )
    except (RuntimeError, ValueError) as error:  # DistNetworkError is a RuntimeError
        where = init_method or f"{env.MASTER_ADDR.raw()}:{env.MASTER_PORT.raw()}"
        busy = any(
            sign in str(error) for sign in ("EADDRINUSE", "already in use", "failed to listen")
        )
        raise DeepSpeedCommError(
            explain(
                f"rank {world.rank} of {world.size} could not join the job at {where}",
                got=str(error).strip().splitlines()[0],
                fix=(
                    "The port is in use: choose another one with --master_port."
                    if busy
                    else "Check MASTER_ADDR and MASTER_PORT, that rank 0 is running, and firewalls."
                ),
            )
        ) from error


def _let_threads_finish() -> None:
    """Give gloo's threads a moment before the interpreter ends.

    A thread that lets go of the last collective's tensors needs the interpreter for it; if that has
    begun to end meanwhile, the thread aborts the process, and work that was done well fails.
    """
    time.sleep(0.05)


def _choose_gloo_interface() -> None:
    """Point gloo at the network that leads to the master, where it would otherwise offer loopback.

    gloo listens at the address that this machine's name resolves to; many systems (Debian's
    /etc/hosts) resolve it to loopback, where other nodes find nobody.
    """
    master = env.MASTER_ADDR.get()
    if not master or env.GLOO_SOCKET_IFNAME.is_set():
        return
    if _is_loopback(master) or not _is_loopback(socket.gethostname()):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, env.MASTER_PORT.get() or 1))  # sends nothing
        except OSError:
            return
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            env.GLOO_SOCKET_IFNAME.set(name)
            return


def _is_loopback(host: str) -> bool:
    """Say whether a name means this machine only, or nothing at all."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True


def _own_store() -> Any:
    dist = torch.distributed
    if hasattr(dist, "HashStore"):
        return dist.HashStore()
    handle, path = tempfile.mkstemp(prefix="deepspeed_store_")
    os.close(handle)
    return dist.FileStore(path, 1)
