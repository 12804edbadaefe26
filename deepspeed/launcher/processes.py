# SPDX-License-Identifier: Apache-2.0
"""A family of processes that lives and dies together: children, and everything they start.

[Note: No process is left behind]
However a launch ends, nothing that it started stays, even where a rank's own children outlive the rank.
Windows: a job object holds the family and dies with us. Linux: we adopt orphans (subreaper), so that all
descendants stay findable, and each child gets a signal when we die (even by ``kill -9``). Other POSIX
systems: descendants, and members of the children's sessions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import BinaryIO

import psutil

from deepspeed.utils.logging import logger

POLL_S = 0.1
WINDOWS = sys.platform == "win32"
LINUX = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

if WINDOWS:
    from . import windows_job


@functools.cache
def _prctl() -> Callable[[int, int], int] | None:
    """Return Linux's prctl, or None where the C library has none."""
    try:
        return ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None


def _linux_setup(death_signal: int, cores: Sequence[int] | None) -> Callable[[], None]:
    """Return what a child does between its start and the program: see the note above."""
    prctl, parent = _prctl(), os.getpid()

    def run() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != parent:  # it died before we asked to hear of it
                os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return run


class Family:
    """The processes started through `start`, with all their descendants.

    Args:
        death_signal: what each child gets when this process dies (Linux).
    """

    def __init__(self, death_signal: int = signal.SIGTERM) -> None:
        self.children: list[subprocess.Popen] = []
        self._death_signal = death_signal
        # whoever was here before us is none of ours (a launcher may be called inside a program)
        self._strangers = set(psutil.Process().children(recursive=True))
        self._job = None
        if WINDOWS:
            try:
                self._job = windows_job.Job()
            except OSError as error:
                logger.warning("no job object (%s): orphans of ranks may stay behind", error)
        elif LINUX and (prctl := _prctl()) is not None:
            prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        log: BinaryIO | None = None,
        cores: Sequence[int] | None = None,
        pipes: bool = False,
        errors_to_us: bool = False,
        own_session: bool = False,
    ) -> subprocess.Popen:
        """Start a member.

        Args:
            command: the program and its arguments; no shell sees them.
            env: its whole environment.
            log: takes its standard output and error; None shares ours.
            cores: cores that it may use; None does not bind it.
            pipes: give all three standard streams to us instead.
            errors_to_us: give standard error to us, and nothing to read to it.
            own_session: shield it from the terminal's signals (POSIX); we pass them on ourselves.

        Raises:
            OSError: there is no such program, or it cannot be run.
        """
        streams: dict = {} if log is None else {"stdout": log, "stderr": subprocess.STDOUT}
        if pipes:
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        if errors_to_us:
            streams |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        if WINDOWS:
            child = self._start_suspended(command, env, cores, streams)
        else:
            setup = _linux_setup(self._death_signal, cores) if LINUX else None
            child = subprocess.Popen(
                list(command),
                env=dict(env),
                start_new_session=own_session,
                preexec_fn=setup,
                **streams,
            )
        self.children.append(child)
        return child

    def _start_suspended(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cores: Sequence[int] | None,
        streams: dict,
    ) -> subprocess.Popen:
        """Windows: not one instruction runs before the job holds the process."""
        child = subprocess.Popen(
            list(command), env=dict(env), creationflags=windows_job.CREATE_SUSPENDED, **streams
        )
        try:
            if self._job is not None:
                self._job.adopt(child)
            if cores:
                psutil.Process(child.pid).cpu_affinity(list(cores))
        except (OSError, psutil.Error) as error:
            logger.warning("process %d: %s", child.pid, error)
        windows_job.resume(child)
        return child

    def members(self) -> list[psutil.Process]:
        """Return every living process of the family but this one."""
        found: set[psutil.Process] = set()
        for process in psutil.Process().children():
            if process not in self._strangers:
                found.add(process)
                _try(lambda process=process: found.update(process.children(recursive=True)))
        if not WINDOWS and not LINUX:
            found.update(_in_sessions({child.pid for child in self.children}))
        return [process for process in found if _alive(process)]

    def end(
        self,
        steps: Sequence[tuple[int, float]] = (),
        *,
        console_event: bool = False,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        """End the whole family: politely where asked, by force in the end.

        Args:
            steps: (signal, seconds to wait) in turn; POSIX.
            console_event: the members have seen a Ctrl-C of their own and may be ending; Windows,
                which has no signals to send, gives them the first step's time.
            hurry: asked while waiting; true goes to force at once.
        """
        if WINDOWS:
            if not (steps and console_event and self._wait(steps[0][1], hurry)) and self._job:
                self._job.kill()
        else:
            for number, seconds in steps:
                for process in self.members():
                    _try(lambda process=process, number=number: process.send_signal(number))
                if self._wait(seconds, hurry):
                    return
        for _ in range(10):
            for process in self.members():
                _try(process.kill)
            if self._wait(1.0):
                return
        logger.error("processes that cannot be ended: %s", [p.pid for p in self.members()])

    def _wait(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Wait until no member lives, for so long at most; say whether that came true."""
        deadline = time.monotonic() + seconds
        while True:
            running = [child for child in self.children if child.poll() is None]
            if not running and not self.members():
                return True
            if time.monotonic() >= deadline or hurry():
                return False
            time.sleep(POLL_S / 4)

    def release(self) -> None:
        """Let what lives go its own way: the work ended well."""
        if self._job is not None:
            self._job.release()
            self._job = None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _in_sessions(leaders: set[int]) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        try:
            if os.getsid(pid) in leaders:
                yield psutil.Process(pid)
        except (OSError, psutil.Error):
            continue


def _try(action: Callable[[], object]) -> None:
    """Do it unless the process has gone meanwhile."""
    try:
        action()
    except (OSError, psutil.Error):
        pass


def wait_all(
    processes: Sequence[subprocess.Popen], seconds: float, hurry: Callable[[], bool]
) -> bool:
    """Wait until all have ended; say whether they have.

    Args:
        processes: what is waited for.
        seconds: at most so long.
        hurry: asked while waiting; true ends the wait.
    """
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or hurry():
            return False
        time.sleep(POLL_S / 2)
    return True


def terminate_process_tree(pid: int) -> None:
    """End a process and its descendants: asked first, by force after 30 seconds."""
    try:
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        _try(process.terminate)
    for process in psutil.wait_procs(tree, timeout=30)[1]:
        _try(process.kill)


def exit_status(code: int) -> int:
    """Turn a child's return code into ours: signal n becomes 128+n, and no failure becomes 0."""
    if WINDOWS and code > 0x7FFFFFFF:  # an exception code: sys.exit takes a signed number
        return code - (1 << 32)
    return 128 - code if code < 0 and not WINDOWS else code


class Signals:
    """While entered, notes the signals that ask us to stop instead of dying of them.

    Attributes:
        received: the first one, or None.
        hurry: whether a later one, a second or more after it, says that patience is over.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.hurry = False
        self._first_at = 0.0
        self._previous: dict[int, object] = {}

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal, or what amounts to one."""
        now = time.monotonic()
        if self.received is None:
            self.received, self._first_at = number, now
        elif now - self._first_at > 1.0:  # one Ctrl-C may reach us twice: terminal and parent
            self.hurry = True

    def __enter__(self) -> Signals:
        names = ["SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP"]
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if ignored and number not in (signal.SIGINT, signal.SIGTERM):
                continue  # nohup
            try:
                self._previous[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: the program around us handles signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
