# SPDX-License-Identifier: Apache-2.0
"""The line that holds a node's ranks to the launcher on another machine.

[Note: The lifeline]
A program started through ssh hears nothing when its caller goes away. So the launcher keeps the standard
input of each node's launch.py open, and launch.py ends its ranks when that line ends, whatever the
reason: the job failed elsewhere, Ctrl-C, the launcher was killed, the connection broke. Bytes on the line
say that the launcher lives (`BEAT`) or was interrupted (`INTERRUPT`); a launcher that sends beats is gone
when it is silent for too long, even if no packet says so (its machine lost power).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

BEAT = b"."
INTERRUPT = b"I"
BEAT_S = 5.0
SILENCE_S = 25.0  # a node that dies ends the job within 30 s


def watch(silence: float, on_end: Callable[[int, str], None]) -> None:
    """Watch standard input, in threads; processes started from now on get the null device instead.

    Args:
        silence: seconds after which a silent line counts as ended; 0 lets it be silent.
        on_end: called once with the signal that the end amounts to, and the reason in words.
    """
    line = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    heard = time.monotonic()
    once = threading.Lock()

    def end(number: int, why: str) -> None:
        if once.acquire(blocking=False):
            on_end(number, why)

    def read() -> None:
        nonlocal heard
        while True:
            try:
                data = os.read(line, 4096)
            except OSError:
                data = b""
            if INTERRUPT in data:
                return end(signal.SIGINT, "the launcher was interrupted")
            if not data:
                return end(signal.SIGTERM, "the launcher closed the line, or is gone")
            heard = time.monotonic()

    def listen() -> None:
        while (quiet := time.monotonic() - heard) < silence:
            time.sleep(silence - quiet)
        end(signal.SIGTERM, f"nothing was heard from the launcher for {silence:.0f} s")

    for job in (read, listen) if silence else (read,):
        threading.Thread(target=job, daemon=True).start()
