# SPDX-License-Identifier: Apache-2.0
"""How fast a save beside training may go: at a few percent of the cores, unless somebody waits for it."""

from __future__ import annotations

import os
import threading
import time

from ..utils import env

SHARE = 0.025
"""Of the cores of this rank: what a save may take. A core that it takes from one thread of an operator holds up all."""
LONGEST = 120.0
"""Seconds after which a save should be over; it goes as fast as that needs."""


class Pace:
    """Makes a thread rest in proportion to the work that it reports.

    Args:
        nbytes: how much is to be written.
    """

    def __init__(self, nbytes: int) -> None:
        self._cores = SHARE * cores_of_rank()
        self._slowest = max(1, nbytes) / LONGEST
        self._lifted = threading.Event()
        self._last = time.monotonic()

    @property
    def is_lifted(self) -> bool:
        """Whether somebody waits for the end."""
        return self._lifted.is_set()

    def lift(self) -> None:
        """Go on without rest, from now on: somebody waits for the end."""
        self._lifted.set()

    def rest(self, seconds: float, nbytes: int) -> None:
        """Wait until the work since the last call is no more than the share of the time since then.

        Args:
            seconds: of a core, that it took.
            nbytes: what was done in them.
        """
        due = self._last + min(seconds / self._cores, nbytes / self._slowest)
        self._lifted.wait(max(0.0, due - time.monotonic()))
        self._last = time.monotonic()


def cores_of_rank() -> float:
    """How many cores this process has for itself: those it is bound to, or its part of the machine's."""
    everything = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity") and (bound := len(os.sched_getaffinity(0))) < everything:
        return bound
    return everything / max(1, min(env.LOCAL_SIZE.get() or 1, everything))
