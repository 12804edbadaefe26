# SPDX-License-Identifier: Apache-2.0
"""Real launches of small scripts: each rank writes what it saw to a file, and nobody imports torch."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = sys.platform == "win32"
UNDER_WINE = WINDOWS and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")

# what a launcher, a scheduler or a developer may have left in our own environment
_FOREIGN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("KMP_AFFINITY", "USE_LIBUV"),
)

TELL = """
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
rank = os.environ["RANK"]
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
seen = {"argv": sys.argv[1:], "env": dict(os.environ), "cores": cores, "pid": os.getpid()}
(here / f"seen_{rank}.tmp").write_text(json.dumps(seen), encoding="utf-8")
os.replace(here / f"seen_{rank}.tmp", here / f"seen_{rank}.json")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **extra}


def command(flags: Sequence[str], script: str, args: Sequence[str]) -> list[str]:
    port = [] if "--master_port" in flags else ["--master_port", str(free_port())]
    return [sys.executable, "-m", "deepspeed", *port, *flags, script, *args]


def launch(
    folder: Path,
    *flags: str,
    script: str = "script.py",
    args: Sequence[str] = (),
    body: str | None = TELL,
    **env: str,
) -> subprocess.CompletedProcess:
    """Write ``body`` to the script, launch it in ``folder`` and wait."""
    if body is not None:
        (folder / script).write_text(body, encoding="utf-8")
    return subprocess.run(
        command(flags, script, args),
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=90,
    )


def start(folder: Path, *flags: str, body: str, script: str = "script.py") -> subprocess.Popen:
    """Like `launch`, without waiting; the launcher leads a process group of its own."""
    (folder / script).write_text(body, encoding="utf-8")
    group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        if WINDOWS
        else {"start_new_session": True}
    )
    return subprocess.Popen(
        command(flags, script, ()),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **group,
    )


def finish(process: subprocess.Popen, timeout: float = 60) -> str:
    """Wait for the end and return the output."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
        process.wait()


def seen(folder: Path) -> list[dict]:
    """What the ranks wrote, by rank."""
    files = sorted(folder.glob("seen_*.json"), key=lambda f: int(f.stem[5:]))
    return [json.loads(f.read_text(encoding="utf-8")) for f in files]


def wait_for(folder: Path, *names: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not come: {list(folder.iterdir())}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_gone(pids: Sequence[int], timeout: float = 10) -> bool:
    deadline = time.monotonic() + timeout
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def interrupt(process: subprocess.Popen) -> None:
    """What Ctrl-C (POSIX) or Ctrl-Break (Windows) does to a whole foreground group."""
    if WINDOWS:
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        os.killpg(process.pid, signal.SIGINT)
