# SPDX-License-Identifier: Apache-2.0
"""How fast a save beside training may go: slowly, unless somebody waits for it."""

from __future__ import annotations

import os
import threading
import time

from ..utils import env

RATE = 150e6
"""Bytes in a second for each core of this rank. A core or a bus that a save takes from one thread of an operator holds up
all of them, so what it takes is spread thin: at this rate steps that use every core take less than a twentieth longer."""
LONGEST = 120.0
"""Seconds after which a save should be over; it goes as fast as that needs."""


class Pace:
    """Makes a thread rest in proportion to what it has written.

    Args:
        nbytes: how much is to be written.
    """

    def __init__(self, nbytes: int) -> None:
        self._rate = max(RATE * cores_of_rank(), nbytes / LONGEST)
        self._lifted = threading.Event()
        self._last = time.monotonic()

    @property
    def is_lifted(self) -> bool:
        """Whether somebody waits for the end."""
        return self._lifted.is_set()

    def lift(self) -> None:
        """Go on without rest, from now on: somebody waits for the end."""
        self._lifted.set()

    def rest(self, nbytes: int) -> None:
        """Wait as long as the bytes that were written since the last call should take."""
        self._lifted.wait(max(0.0, self._last + nbytes / self._rate - time.monotonic()))
        self._last = time.monotonic()


def cores_of_rank() -> float:
    """How many cores this process has for itself: those it is bound to, or its part of the machine's."""
    everything = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity") and (bound := len(os.sched_getaffinity(0))) < everything:
        return bound
    return everything / max(1, min(env.LOCAL_SIZE.get() or 1, everything))
