# SPDX-License-Identifier: Apache-2.0
"""torch's elastic agent with an environment of our own for the ranks that it starts, and starts again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import psutil
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from ..constants import CROSS_RANK, CROSS_SIZE
from ..utils import env


class DSElasticAgent(LocalElasticAgent):
    """One node's agent: it keeps this node's ranks running while nodes come and go.

    When a rank fails, or a node joins or leaves, all ranks are ended and started again, numbered anew, as
    long as there are enough nodes and restarts left. A script goes on where its last checkpoint is.

    Args:
        spec: what to run, how often at most, and the rendezvous.
        env: environment of the ranks beside this process's own and torch's variables.
        start_method: how function entry points are started.
        exit_barrier_timeout: seconds to wait at the end for the other nodes' agents.
        log_dir: folder for the ranks' output; None leaves it on ours.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        env: Mapping[str, str],
        start_method: str = "spawn",
        exit_barrier_timeout: float = 300,
        log_dir: str | None = None,
    ) -> None:
        redirects = Std.NONE if log_dir is None else Std.ALL
        logs = DefaultLogsSpecs(log_dir=log_dir, redirects=redirects)
        super().__init__(spec, logs, start_method, exit_barrier_timeout)
        self.ds_env = dict(env)

    def _stop_workers(self, *args: Any, **kwargs: Any) -> None:
        """End this node's ranks; torch 2.3.0 would close the rendezvous too, and nobody could start again."""
        handler, self._rdzv_handler = self._rdzv_handler, None
        try:
            super()._stop_workers(*args, **kwargs)
        finally:
            self._rdzv_handler = handler

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start this node's ranks with our variables in the environment that they inherit."""
        group = {
            CROSS_RANK: str(worker_group.group_rank),
            CROSS_SIZE: str(worker_group.group_world_size),
            "LOCAL_SIZE": str(worker_group.spec.local_world_size),
        }
        with env.overlaid({**self.ds_env, **group}):
            started = super()._start_workers(worker_group)
        if sys.platform == "win32":
            for handler in self._pcontext.subprocess_handlers.values():
                handler.close = functools.partial(_end_tree, handler.proc.pid)
        return started


def _end_tree(pid: int, death_sig: int | None = None) -> None:
    """End a rank and what it started. torch's own way on Windows, a Ctrl-C event, ends us too, or fails."""
    try:
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
    except psutil.Error:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.Error:
            continue
