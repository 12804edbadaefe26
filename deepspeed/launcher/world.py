# SPDX-License-Identifier: Apache-2.0
"""Who runs where: ranks over the slots of all hosts, and what starts one of them."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed.constants import CROSS_RANK, CROSS_SIZE
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .processes import WINDOWS

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"  # of both accelerators, cpu and cuda
POD_ENV = Path("/dlts-runtime/env/pod.env")


@dataclass(frozen=True)
class World:
    """Who runs where.

    Attributes:
        ranks: global ranks of each host.
        slots: this node's slots; their position is the local rank.
        host: this node's name in the world info.
        node_rank: its index among the hosts.
    """

    ranks: Mapping[str, list[int]]
    slots: list[int]
    host: str
    node_rank: int

    @classmethod
    def build(cls, info: Mapping[str, list[int]], node_rank: int) -> World:
        """Number the slots of all hosts in order.

        Raises:
            ValueError: there is no node ``node_rank``, or it has no slot.
        """
        hosts = list(info)
        if not 0 <= node_rank < len(hosts):
            raise ValueError(
                explain(
                    "no such node in the world info",
                    got=f"--node_rank={node_rank}",
                    expected=f"0 to {len(hosts) - 1}",
                )
            )
        ranks: dict[str, list[int]] = defaultdict(list)
        count = 0
        for host, slots in info.items():
            ranks[host] = list(range(count, count + len(slots)))
            count += len(slots)
        host = hosts[node_rank]
        if not info[host]:
            raise ValueError(explain(f"host {host!r} has no slot", got=repr(dict(info))))
        return cls(ranks, info[host], host, node_rank)

    @property
    def size(self) -> int:
        """Number of ranks on all hosts."""
        return sum(map(len, self.ranks.values()))

    def say(self, info: Mapping[str, list[int]]) -> None:
        """Log who runs where."""
        logger.info("WORLD INFO DICT: %s", dict(info))
        logger.info(
            "nnodes=%d, num_local_procs=%d, node_rank=%d",
            len(self.ranks),
            len(self.slots),
            self.node_rank,
        )
        logger.info("global_rank_mapping=%s", self.ranks)
        logger.info("dist_world_size=%d", self.size)

    def environment(
        self, inherited: Mapping[str, str], master_addr: str, master_port: int
    ) -> list[dict[str, str]]:
        """Return the environment of each rank of this node."""
        visible = ",".join(map(str, self.slots))
        logger.info("Setting %s=%s", VISIBLE_DEVICES, visible)
        shared = {
            **inherited,
            **_pod_environment(),
            VISIBLE_DEVICES: visible,
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": str(master_port),
            "WORLD_SIZE": str(self.size),
            CROSS_RANK: str(self.node_rank),
            CROSS_SIZE: str(len(self.ranks)),
            "LOCAL_SIZE": str(len(self.slots)),
        }
        if WINDOWS:  # torch's Windows wheels ask for a libuv that they were built without
            shared.setdefault("USE_LIBUV", "0")
        return [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
            for local, rank in enumerate(self.ranks[self.host])
        ]


def _pod_environment() -> dict[str, str]:
    """Return what a DLTS pod exports: lines ``export NAME=VALUE``."""
    if not POD_ENV.is_file():
        return {}
    lines = POD_ENV.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.removeprefix("export ").strip().partition("=") for line in lines)
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def rank_command(args: argparse.Namespace, local_rank: int) -> list[str]:
    """Return the words that start one rank, without core binding."""
    script = args.training_script
    if args.no_python:
        command = [_program(script)]
    else:
        command = [sys.executable, "-u", *(["-m"] if args.module else []), script]
    if not args.no_local_rank:
        command.append(f"--local_rank={local_rank}")
    return command + args.training_script_args


def _program(script: str) -> str:
    """Return a program's name so that the system finds what `check_program` found."""
    found = shutil.which(script)
    if found is None:
        return str(Path(script).resolve())
    return found if WINDOWS else script  # Windows itself would not try .cmd and .bat
