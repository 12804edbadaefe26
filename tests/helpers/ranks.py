# SPDX-License-Identifier: Apache-2.0
"""Runs test functions on several gloo ranks, each a real process, started once and used again.

Starting torch costs seconds, so ranks are kept: `RankPool` starts its processes at the first `run` and sends
them functions from then on. Tests take the pools of the session from fixtures (tests/dist/conftest.py)::

    def sums(rank, scale):                     # a module-level function: it travels by name
        tensor = torch.full((3,), scale * (rank + 1.0))
        torch.distributed.all_reduce(tensor)
        return tensor

    def test_sum_over_two_ranks(ranks2):
        first, second = ranks2.run(sums, 2.0)  # the ranks' results, in their order
        torch.testing.assert_close(first, torch.full((3,), 6.0))

In a rank, torch.distributed has a gloo default group, the launcher's variables (RANK, LOCAL_RANK, WORLD_SIZE,
...) are set, torch runs one thread and is seeded with 1234 before each function, DS_ACCELERATOR is cpu, and warnings are errors.
Arguments and results travel by pickle. State of modules (deepspeed's groups, for one) lives on from
function to function, as the process does.

A function that raises on any rank fails the `run` with that rank's traceback; a rank that dies, or does not
answer in time, fails it with the stacks of those that hang. After a failure the processes are ended and the
next `run` starts new ones, so that one failing test does not spoil its neighbours.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# how long the other ranks may go on after one has failed, in seconds: their errors are usually the consequence
GRACE = 1.0
START_TIMEOUT = 120.0


class RankError(AssertionError):
    """A rank failed; the message carries its traceback."""


class RankTimeout(RankError):
    """Ranks did not answer in time; the message carries their stacks."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list:
    """Run ``fn(rank, *args)`` on ``world_size`` ranks of their own; return the results in order.

    For functions that change their process for good; others use a pool of the session.

    Raises:
        RankError: a rank raised, died or hung.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args, timeout=timeout)


class RankPool:
    """``world_size`` processes joined by gloo, that run the functions sent to them."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        self.world_size = world_size
        self.backend = backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list:
        """Run ``fn(rank, *args)`` on every rank at once; return the results in the ranks' order.

        Args:
            fn: a module-level function.
            args: picklable values, the same for every rank.
            timeout: seconds until hanging ranks are ended.

        Raises:
            RankError: a rank raised, died or hung.
        """
        if not self._processes:
            self._start()
            self._collect(START_TIMEOUT, "starting")
        job = pickle.dumps((fn, args, timeout))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        return self._collect(timeout, getattr(fn, "__name__", str(fn)))

    def close(self) -> None:
        """End the processes; the next `run` would start new ones."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for process in self._processes:
            process.join(timeout=5)
        self._kill()

    # ------------------------------------------------------------------ inside
    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ds_ranks_", ignore_cleanup_errors=True)
        port = free_port()
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when a child loads torch's libraries
        try:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(rank, self.world_size, self.backend, port, self._folder.name, theirs),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads

    def _collect(self, timeout: float, what: str) -> list:
        """Wait for every rank's answer; on the first failure, or at the limit, end them all."""
        results: dict[int, Any] = {}
        failures: list[tuple[int, str]] = []
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size:
            left = deadline - time.monotonic()
            failed = {rank for rank, _ in failures}
            waiting = [r for r in range(self.world_size) if r not in results and r not in failed]
            ready = wait([self._pipes[rank] for rank in waiting], max(left, 0))
            if not ready:
                break
            for rank in waiting:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    ok, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(timeout=5)
                    ok, value = False, f"died with exit code {self._processes[rank].exitcode}"
                if ok:
                    results[rank] = value
                else:
                    failures.append((rank, value))
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            self._kill()
            rank, text = failures[0]
            raise RankError(f"{what}: rank {rank} of {self.world_size} failed\n{text}")
        if len(results) < self.world_size:
            late = [rank for rank in range(self.world_size) if rank not in results]
            stacks = self._stacks(late)
            self._kill()
            raise RankTimeout(f"{what}: ranks {late} did not finish in {timeout} s\n{stacks}")
        return [results[rank] for rank in range(self.world_size)]

    def _stacks(self, ranks: list[int]) -> str:
        time.sleep(0.3)  # the ranks write their stacks when their own, equal limit passes
        assert self._folder is not None
        texts = []
        for rank in ranks:
            path = Path(self._folder.name) / f"stack{rank}"
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            texts.append(f"rank {rank}:\n{text or '(no stack)'}")
        return "\n".join(texts)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(timeout=10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(
    rank: int, world_size: int, backend: str, port: int, folder: str, pipe: Connection
) -> None:
    """Be one rank: join the others, then run what arrives until an empty message or the end of the pipe."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cuda" if backend == "nccl" else "cpu",
    )
    with open(Path(folder) / f"stack{rank}", "w", encoding="utf-8") as stack:
        try:
            import torch
            import torch.distributed as dist

            torch.set_num_threads(1)
            dist.init_process_group(
                backend,
                store=dist.FileStore(str(Path(folder) / "store"), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
            dist.barrier()
            gc.freeze()  # torch's own objects need not be visited after each function
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return
        pipe.send_bytes(pickle.dumps((True, None)))
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                break
            if not message:
                break
            pipe.send_bytes(_answer(rank, message, stack))
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # no interpreter shutdown: it may wait for others' connections


def _answer(rank: int, message: bytes, stack: Any) -> bytes:
    import torch

    try:
        fn, args, timeout = pickle.loads(message)
        faulthandler.dump_traceback_later(timeout, file=stack)
        torch.manual_seed(1234)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = fn(rank, *args)
        answer = pickle.dumps((True, result))
    except BaseException:  # SystemExit too: the test is to see it
        answer = pickle.dumps((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
    gc.collect()
    return answer
