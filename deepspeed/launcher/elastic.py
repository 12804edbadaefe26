# SPDX-License-Identifier: Apache-2.0
"""One node of an elastic run: launch.py's ranks under torch's elastic agent."""

from __future__ import annotations

import _thread
import argparse
import os
import signal
import socket
from types import FrameType
from typing import TYPE_CHECKING, Any

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .constants import NO_RANK_LOG
from .lifeline import watch
from .processes import WINDOWS, Family, exit_status
from .world import World, rank_command

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server import WorkerSpec

MAX_RESTARTS = 100
MONITOR_S = 5.0
RUN_ID = "123456789"


def _own_address(master_addr: str, master_port: int) -> str:
    """Return this node's address on the network that leads to the master: others may not know its name."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master_addr, master_port))  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return socket.gethostname()


def _numbers(args: argparse.Namespace, nodes: int) -> tuple[int, int]:
    low = 1 if args.min_elastic_nodes == -1 else args.min_elastic_nodes
    high = nodes if args.max_elastic_nodes == -1 else args.max_elastic_nodes
    if not 1 <= low <= high:
        raise ValueError(
            explain(
                "impossible numbers of elastic nodes",
                got=f"--min_elastic_nodes={low} --max_elastic_nodes={high}",
                expected="1 <= min <= max",
            )
        )
    return low, high


def _windows_rendezvous(args: argparse.Namespace, parameters: Any, host: bool) -> Any:
    """Make torch's c10d rendezvous over a store without libuv, which torch's Windows builds lack."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    store = TCPStore(
        args.master_addr,
        args.master_port,
        is_master=host,
        wait_for_workers=False,
        multi_tenant=True,
        use_libuv=False,
    )
    return create_handler(store, C10dRendezvousBackend(store, parameters.run_id), parameters)


def worker_spec(args: argparse.Namespace, world: World) -> WorkerSpec:
    """Describe this node's ranks to torch's agent.

    Raises:
        ValueError: the numbers of nodes are impossible.
    """
    from torch.distributed.elastic.agent.server import WorkerSpec
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    low, high = _numbers(args, len(world.ranks))
    host = world.node_rank == 0
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{args.master_addr}:{args.master_port}",
        run_id=os.environ.get("ELASTIC_RUN_ID") or RUN_ID,
        min_nodes=low,
        max_nodes=high,
        is_host=host,
    )
    rendezvous = (
        _windows_rendezvous(args, parameters, host)
        if WINDOWS
        else registry.get_rendezvous_handler(parameters)
    )
    words = [word.replace("$", "$$") for word in rank_command(args, 0)]
    if not args.no_local_rank:
        at = words.index("--local_rank=0")
        words[at] = "--local_rank=${local_rank}"  # the agent fills it in
    return WorkerSpec(
        role="default",
        local_world_size=len(world.slots),
        entrypoint=words[0],
        args=tuple(words[1:]),
        rdzv_handler=rendezvous,
        max_restarts=MAX_RESTARTS,
        monitor_interval=MONITOR_S,
        local_addr=_own_address(args.master_addr, args.master_port),
    )


def launch_elastically(args: argparse.Namespace, world: World) -> int:
    """Run this node's ranks until they end well, or cannot be started again.

    Returns:
        0 when all ended well, a failing rank's status, or 1 after a signal.

    Raises:
        ValueError: the numbers of nodes are impossible.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    from deepspeed.elasticity.elastic_agent import DSElasticAgent

    def stop(number: int, frame: FrameType | None) -> None:
        raise SignalException(f"signal {number}", sigval=signal.Signals(number))

    def cut_off(number: int, why: str) -> None:
        logger.warning("ending this node's ranks: %s", why)
        _thread.interrupt_main(number)

    names = (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"
    )  # fmt: skip
    (env, *_) = world.environment(os.environ, args.master_addr, args.master_port)
    family = Family()
    # torch would have all rounds of ranks meet in one store, where the second finds the first's addresses
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if WINDOWS:
        os.environ.setdefault("USE_LIBUV", "0")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        log = None if args.enable_each_rank_log == NO_RANK_LOG else args.enable_each_rank_log
        if args.lifeline is not None:
            watch(args.lifeline, cut_off)
        agent = DSElasticAgent(
            worker_spec(args, world),
            {name: value for name, value in env.items() if name not in names},
            log_dir=log,
        )
        result = agent.run()
    except SignalException as error:
        logger.error("ended by %s", error)
        return 1
    finally:
        family.end(((signal.SIGTERM, 10.0),))
    if not result.is_failed():
        return 0
    failed = min(result.failures.items())
    logger.error("rank %d failed after %d restarts: %s", failed[0], MAX_RESTARTS, failed[1].message)
    return exit_status(failed[1].exitcode) or 1
