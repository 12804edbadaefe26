# SPDX-License-Identifier: Apache-2.0
"""Under MPICH: name this rank as torch expects, then run the script in its place."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from deepspeed.launcher.arguments import ScriptParser
from deepspeed.launcher.processes import exit_status

_NAMES = {
    "RANK": ("PMIX_RANK", "PMI_RANK"),
    "LOCAL_RANK": ("PALS_LOCAL_RANKID", "MPI_LOCALRANKID"),
}


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the line that `MPICHRunner` writes."""
    parser = ScriptParser("user_script", "user_args", usage="%(prog)s [flags] script [args...]")
    parser.add_argument("--launcher", default="mpich", help="who starts us")
    parser.add_argument("--module", action="store_true", help="run the script as python -m does")
    parser.add_argument("--no_python", action="store_true", help="run the script itself")
    return parser.parse_args(args)


def rank_environment() -> dict[str, str]:
    """Return our environment with RANK and LOCAL_RANK in it.

    Raises:
        KeyError: MPI told neither.
    """
    env = dict(os.environ)
    for ours, theirs in _NAMES.items():
        found = [env[name] for name in theirs if name in env]
        if not found:
            raise KeyError(f"none of {', '.join(theirs)} is in the environment; start by mpirun")
        env[ours] = found[0]
    return env


def main(args: Sequence[str] | None = None) -> None:
    """Run the script; exits with its status."""
    words = parse_args(args)
    python = [] if words.no_python else [sys.executable, "-u", *(["-m"] if words.module else [])]
    command = [*python, words.user_script, *words.user_args]
    line = _line_to_mpi()
    keep = {"pass_fds": (line,)} if line is not None else {}  # the script may speak MPI itself
    status = exit_status(subprocess.run(command, env=rank_environment(), **keep).returncode)
    if status and line is not None:
        _abort(line, status)
    sys.exit(status)


def _line_to_mpi() -> int | None:
    """Return the descriptor of the line to MPI's process manager, if this process has one."""
    fd = os.environ.get("PMI_FD", "")
    return int(fd) if fd.isdigit() and os.name == "posix" else None


def _abort(line: int, status: int) -> None:
    """Ask MPI to end the other ranks: it does so by itself only for programs that have called MPI."""
    try:
        os.write(line, f"cmd=abort exitcode={status}\n".encode("ascii"))
        time.sleep(1.0)  # it ends us too
    except OSError:
        pass


if __name__ == "__main__":
    main()
