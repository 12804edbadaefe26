# SPDX-License-Identifier: Apache-2.0
"""Commands on several hosts at once, one local client (ssh) each: their output, their end, their failures."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, TextIO

from deepspeed.utils.logging import logger

from .lifeline import BEAT, BEAT_S, INTERRUPT
from .processes import POLL_S, Family, Signals, exit_status, wait_all

# launch.py asks its ranks for 15 s before it forces them
PATIENCE_S = 20.0
_LINE_ENDS = re.compile(rb"(?<=\n)|(?<=\r)(?!\n)")  # a progress bar redraws itself after \r
_output = threading.Lock()


class Member:
    """One host's client.

    Attributes:
        host: the host.
        process: the client.
        complaint: the last lines it wrote to standard error.
    """

    def __init__(self, host: str, process: subprocess.Popen, hello: bytes, beats: bool) -> None:
        self.host, self.process, self.complaint = host, process, ""
        self._stop, self._interrupted = threading.Event(), False
        self._pumps = [
            self._thread(self._pump, process.stdout, sys.stdout, False),
            self._thread(self._pump, process.stderr, sys.stderr, True),
        ]
        self._thread(self._feed, process.stdin, hello, beats)

    @staticmethod
    def _thread(job: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=job, args=args, daemon=True)
        thread.start()
        return thread

    def _feed(self, line: IO[bytes], hello: bytes, beats: bool) -> None:
        """Say hello, then that we live; at the end let go of the line."""
        try:
            line.write(hello)
            line.flush()
            while beats and not self._stop.wait(BEAT_S):
                line.write(BEAT)
                line.flush()
            if self._interrupted:
                line.write(INTERRUPT)
                line.flush()
        except OSError:  # it has ended
            pass
        try:
            line.close()
        except OSError:
            pass

    def _pump(self, source: IO[bytes], sink: TextIO, keep: bool) -> None:
        prefix, pending = f"{self.host}: ".encode(), b""
        while data := os.read(source.fileno(), 65536):
            *lines, pending = _LINE_ENDS.split(pending + data)
            if lines:
                _write(sink, b"".join(prefix + line for line in lines))
            if keep:
                text = data.decode("utf-8", errors="replace")
                self.complaint = (self.complaint + text)[-2000:]
        source.close()
        if pending:
            _write(sink, prefix + pending + b"\n")

    def let_go(self, interrupted: bool) -> None:
        """Close the line, which ends what runs there."""
        self._interrupted = self._interrupted or interrupted
        self._stop.set()

    def drain(self) -> None:
        """Wait until all that it wrote is written."""
        for thread in self._pumps:
            thread.join(timeout=2.0)


def _write(sink: TextIO, data: bytes) -> None:
    with _output:
        raw = getattr(sink, "buffer", None)
        if raw is None:
            sink.write(data.decode("utf-8", errors="replace"))
        else:
            raw.write(data)
        sink.flush()


class Fleet:
    """Clients that make one job.

    Args:
        signals: what asks us to stop.
        tolerated: how many members may fail before the others are ended; None lets all of them run to
            their end.
        beats: tell members that we live until they end; else their standard input ends after the hello.
        mend: says what a failed member's complaint asks for, given its host and complaint.
    """

    def __init__(
        self,
        signals: Signals,
        *,
        tolerated: int | None = 0,
        beats: bool = True,
        mend: Callable[[str, str], str] = lambda host, complaint: "",
    ) -> None:
        self._signals, self._tolerated = signals, tolerated
        self._beats, self._mend = beats, mend
        self._family = Family()
        self._members: list[Member] = []
        self._failed: list[Member] = []

    def start(self, host: str, command: Sequence[str], hello: bytes = b"") -> None:
        """Start one member.

        Args:
            host: the name that its lines of output begin with.
            command: the client and its arguments.
            hello: what it reads first.
        """
        process = self._family.start(command, os.environ, pipes=True, own_session=True)
        self._members.append(Member(host, process, hello, self._beats))

    def wait(self) -> int:
        """Wait for all members; a failure beyond the tolerated ones, or a signal, ends them all.

        Returns:
            0 when all ended well, or enough of them; the first failing one's status; 1 after a signal.
        """
        try:
            status = self._supervise()
        finally:
            self._family.end(((signal.SIGTERM, 1.0),))
        for member in self._members:
            member.let_go(False)
            member.drain()
        return status

    def _supervise(self) -> int:
        running = list(self._members)
        while running:
            if self._signals.received is not None:
                logger.error(
                    "ended by %s; ending all nodes", signal.Signals(self._signals.received).name
                )
                self._end_all(self._signals.received == signal.SIGINT)
                return 1
            for member in [m for m in running if m.process.poll() is not None]:
                running.remove(member)
                if member.process.returncode != 0:
                    self._report(member, [other.host for other in running])
            if self._tolerated is not None and len(self._failed) > self._tolerated:
                self._end_all(False)
                break
            time.sleep(POLL_S / 2)
        if len(self._failed) > (self._tolerated or 0):
            return exit_status(self._failed[0].process.returncode) or 1
        return 0

    def _report(self, member: Member, others: Sequence[str]) -> None:
        member.drain()
        self._failed.append(member)
        ends = self._tolerated is not None and len(self._failed) == self._tolerated + 1
        logger.error(
            "node %s ended with status %d%s%s",
            member.host,
            member.process.returncode,
            f"; ending {', '.join(others)}" if others and ends else "",
            self._mend(member.host, member.complaint) if member.process.returncode == 255 else "",
        )

    def _end_all(self, interrupted: bool) -> None:
        for member in self._members:
            member.let_go(interrupted)
        processes = [member.process for member in self._members]
        wait_all(processes, PATIENCE_S, lambda: self._signals.hurry)
