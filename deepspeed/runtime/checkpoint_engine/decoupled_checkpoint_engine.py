# SPDX-License-Identifier: Apache-2.0
"""Saves that are written while training goes on.

[Note: A save beside training]
`save_checkpoint` copies the state into memory of its own (`Snapshot`), starts a thread that writes the copy, and
returns. The thread takes no part in communication, and takes its time (`Pace`). After each optimizer step while a save
is on its way the ranks ask each other whether all threads are through; when they are, all ranks vote, and a thread of
the leading one publishes, or all raise what went wrong. After the step that finds it published too, the save is over.
The next save, a load and `destroy` wait for all that, and the threads then go as fast as they can. A program that ends
before waits for its thread, and the leading rank publishes by the notes that the others' threads leave beside their
files, because at that time there may be nobody left to vote. Memory: one copy of this rank's state; where that would be
more than half of the free memory on any rank, all save at once instead.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

import torch

from ...checkpoint.archive import Archive
from ...checkpoint.atomic import Entry, Publication
from ...checkpoint.pace import Pace
from ...checkpoint.snapshot import Snapshot, can_all_copy
from ...checkpoint.stream import MOCK, Settings
from ...comm.flat import all_ok
from ...utils.logging import logger
from ...utils.thread_priority import step_back
from .checkpoint_engine import CheckpointCommitInfo
from .torch_checkpoint_engine import FastCheckpointEngine, lay_out, total_size, write_all

T = TypeVar("T")

_EXIT_SECONDS = 120.0
"""How long a rank that ends waits for the others' notes."""


class _Beside(Generic[T]):
    """Work on a thread of its own, that steps back behind training."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._value: T | None = None
        self._failure: Exception | None = None

        def run() -> None:
            step_back()  # a core that this takes from one thread of an operator holds up all of them
            try:
                self._value = action()
            except Exception as error:  # raised where it is waited for
                self._failure = error

        self._thread = threading.Thread(target=run, name="checkpoint-writer")
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the thread is through."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the thread; raises what it met."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return cast(T, self._value)


class _Pending:
    """A save on its way: first each rank's files are written, then the leading rank publishes them."""

    def __init__(
        self, publication: Publication, archives: Mapping[str, Archive], settings: Settings
    ) -> None:
        self.publication, self.peers = publication, publication.peers()
        self.pace = Pace(total_size(archives))
        self.publishing: _Beside[None] | None = None

        def write() -> list[Entry]:
            entries = write_all(publication.partial, archives, settings, pace=self.pace)
            if not publication.crew.leads:
                publication.note_done(entries)
            return entries

        self.writing = _Beside(write)

    @property
    def is_ready(self) -> bool:
        """Whether this rank's thread is through with what it does now."""
        return (self.publishing or self.writing).is_over

    def publish(self) -> None:
        """Collectively vote, and have the leading rank begin to publish."""
        publication = self.publication
        written = publication.collect(self.writing.result)

        def publish() -> None:
            if publication.crew.leads:
                publication.publish_alone(written)

        self.publishing = _Beside(publish)

    def finish(self) -> None:
        """Collectively complete what is left."""
        self.pace.lift()
        if self.publishing is None:
            self.publication.finish(self.writing.result)
        else:
            self.publication.crew.together(self.publishing.result)


class DecoupledCheckpointEngine(FastCheckpointEngine):
    """Writes saves beside training; see [Note: A save beside training]."""

    def __init__(self, config_params: Any = None) -> None:
        super().__init__(config_params)
        self._snapshot = Snapshot()
        self._pending: _Pending | None = None
        _before_exit(self)

    @property
    def settings(self) -> Settings:
        """How files are written: with one thread for checksums, the others are training's."""
        return replace(super().settings, summers=1)

    def is_decoupled(self) -> bool:
        return True

    @property
    def is_busy(self) -> bool:
        """Whether a save is on its way."""
        return self._pending is not None

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Wait until everything is stored."""
        self.finish()
        return super().commit(info)

    def store(self, publication: Publication, files: Mapping[str, Any], as_zip: bool) -> None:
        """Collectively copy this rank's files and begin to write them; `finish` or `at_boundary` publishes."""
        self.finish()
        if not as_zip or self.settings.type == MOCK:
            super().store(publication, files, as_zip)
            return
        archives = lay_out(publication, files)
        shared = self.divide(publication, archives)
        wanted = self._snapshot.wants(archives.values())
        if not can_all_copy(publication.crew.exchange, wanted):
            logger.warning("too little free memory for a copy of the state: training waits")
            self.store_at_once(publication, archives, shared)
            return
        publication.begin(total_size(archives), shared)
        try:
            publication.crew.together(lambda: self._snapshot.take(archives.values()))
        except Exception:
            publication.abandon()
            raise
        self._pending = _Pending(publication, archives, self.settings)

    def finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finish()

    def at_boundary(self, axis: Any) -> None:
        pending = self._pending
        if pending is None or not all_ok(pending.is_ready, axis):
            return
        self._pending = None  # and stays so if what follows raises
        if pending.publishing is None:
            pending.publish()
            self._pending = pending
        else:
            pending.finish()

    def cleanup(self) -> None:
        """Collectively complete what is on its way, and give the memory back."""
        alone = self._pending is not None and self._pending.publication.crew.size > 1
        if alone and not torch.distributed.is_initialized():
            self.finish_alone()
        self.finish()
        self._snapshot.release()
        super().cleanup()

    def finish_alone(self) -> None:
        """Complete a save when the program ends, without a vote: others may be gone."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        publication = pending.publication
        pending.pace.lift()
        try:
            if pending.publishing is not None:
                pending.publishing.result()
                return
            own = pending.writing.result()
            if not publication.crew.leads:
                return
            others = [rank for rank in pending.peers if rank != publication.crew.rank]
            noted = _wait_for(lambda: publication.noted(others))
            if noted is None:
                logger.error(
                    f"{publication.final} was not saved: a rank among {others} did not complete its files"
                )
                return
            publication.publish_alone([own, *noted])
        except Exception as error:  # nobody is left to catch it
            logger.error(f"{publication.final} was not saved: {type(error).__name__}: {error}")


def _wait_for(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _EXIT_SECONDS
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _before_exit(engine: DecoupledCheckpointEngine) -> None:
    """Have `finish_alone` called while the interpreter still runs new work in threads."""
    known = weakref.ref(engine)

    def finish() -> None:
        found = known()
        if found is not None:
            found.finish_alone()

    # atexit comes too late: by then the pools of concurrent.futures take no more work
    getattr(threading, "_register_atexit", atexit.register)(finish)
