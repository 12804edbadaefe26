# SPDX-License-Identifier: Apache-2.0
"""Starts this node's ranks and answers for them: ``python -m deepspeed.launcher.launch``."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import numa
from deepspeed.utils.errors import DeepSpeedError, explain
from deepspeed.utils.logging import logger, set_log_level_from_string

from .arguments import ScriptParser, check_program
from .constants import NO_RANK_LOG
from .hostfile import decode_world_info
from .lifeline import watch
from .processes import (
    LINUX,
    POLL_S,
    WINDOWS,
    Family,
    Signals,
    exit_status,
    terminate_process_tree,
)
from .world import VISIBLE_DEVICES, World, rank_command

__all__ = ["VISIBLE_DEVICES", "main", "parse_args", "terminate_process_tree"]

PID_FILE_BASEPATH = tempfile.gettempdir()

# after one rank failed, the others may say why they fail as well, then are asked, then forced
FAILURE_GRACE_S = 0.5
AFTER_FAILURE = ((signal.SIGTERM, 30.0),)


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line that the runner writes (see contract of `deepspeed.launcher.launch`)."""
    parser = ScriptParser(
        "training_script",
        "training_script_args",
        prog="deepspeed.launcher.launch",
        usage="%(prog)s [flags] training_script [args...]",
        description="Start the ranks of one node.",
    )
    add = parser.add_argument
    add("--node_rank", type=int, default=0, help="this node's index among the nodes")
    add("--master_addr", default="127.0.0.1", help="address of the node of rank 0")
    add("--master_port", type=int, default=TORCH_DISTRIBUTED_DEFAULT_PORT, help="its port")
    add("--world_info", default="None", help="hosts and slots, base64 of JSON")
    add("--module", action="store_true", help="run the script as python -m does")
    add("--no_python", action="store_true", help="run the script itself, without Python")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank to the script")
    add("--enable_elastic_training", action="store_true", help="let ranks come and go")
    add("--min_elastic_nodes", type=int, default=-1, help="fewest nodes of an elastic run")
    add("--max_elastic_nodes", type=int, default=-1, help="most nodes of an elastic run")
    add("--save_pid", type=int, default=0, help="write our process id to <temp>/<N>.deepspeed")
    add("--enable_each_rank_log", default=NO_RANK_LOG, help="folder for one log file a rank")
    add(
        "--lifeline",
        type=float,
        default=None,
        help="end when standard input ends, or after so long",
    )
    add("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    add("--bind_core_list", default=None, help="cores to share out, such as 0-7,12-19")
    add("--log_level", default="info", help="debug, info, warning, error or critical")
    add("-q", "--quiet", action="store_true", help="the same as --log_level error")
    return parser.parse_args(args)


def check_port(port: int) -> None:
    """Check that rank 0 will be able to listen.

    Raises:
        ValueError: there is no such port.
        OSError: somebody else listens there, or we may not.
    """
    if not 0 < port < 65536:
        raise ValueError(
            explain("no such port", got=f"--master_port={port}", expected="1 to 65535")
        )
    for attempt in range(5):  # two launchers that check at once see each other for a moment
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            if WINDOWS:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:  # a port in TIME_WAIT is free to listen at
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return
            except OSError as error:
                reason = error.strerror or str(error)
        if attempt < 4:
            time.sleep(0.1)
    raise OSError(
        explain(
            f"port {port} cannot be used for the rendezvous",
            got=reason,
            expected="a free port",
            fix="Another run may be using it: end it, or choose another port with --master_port.",
        )
    )


@contextmanager
def pid_file(number: int) -> Iterator[None]:
    """Keep ``<temp>/<number>.deepspeed``, holding our process id, while entered; 0 keeps none.

    Raises:
        AssertionError: the file is there and its owner lives.
    """
    if not number:
        yield
        return
    path = Path(PID_FILE_BASEPATH) / f"{number}.deepspeed"
    if path.exists():
        owner = path.read_text(encoding="utf-8").strip()
        if not owner.isdigit() or psutil.pid_exists(int(owner)):
            raise AssertionError(
                explain("pid file exists, shouldn't happen", got=f"{path} of process {owner}")
            )
    path.write_text(str(os.getpid()), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _open_log(folder: str, rank: int) -> BinaryIO:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y%m%d%H%M%S')}_rank{rank}.log"
    return (path / name).open("ab", buffering=0)


def _start_ranks(
    args: argparse.Namespace, envs: list[dict[str, str]], family: Family, logs: ExitStack
) -> None:
    for local, env in enumerate(envs):
        command, cores = rank_command(args, local), None
        if args.bind_cores_to_rank:
            if LINUX and numa.check_for_numactl_pkg():
                count, prefix = numa.get_numactl_cmd(args.bind_core_list, len(envs), local)
                command = prefix + command
            else:
                cores = numa.cores_of_rank(args.bind_core_list, len(envs), local)
                count = len(cores)
            env["OMP_NUM_THREADS"] = str(count)
        log = None
        if args.enable_each_rank_log != NO_RANK_LOG:
            log = logs.enter_context(_open_log(args.enable_each_rank_log, int(env["RANK"])))
        child = family.start(command, env, log=log, cores=cores, own_session=True)
        logger.info("process %d spawned with command: %s", child.pid, command)


def _supervise(family: Family, signals: Signals) -> int:
    """Wait for the ranks; return our own exit status."""
    running = list(family.children)
    while running:
        if signals.received is not None:
            return _interrupted(family, signals)
        ended = [child for child in running if child.poll() is not None]
        # of several, one that died of a signal is the cause: an exception may be its echo
        for child in sorted(ended, key=lambda child: child.returncode):
            running.remove(child)
            if child.returncode != 0:
                return _failed(family, child)
            logger.info("Process %d exits successfully.", child.pid)
        if running:
            time.sleep(POLL_S)
    return 0


def _interrupted(family: Family, signals: Signals) -> int:
    number = signals.received or signal.SIGTERM
    for child in family.children:
        logger.info("Killing subprocess %d", child.pid)
    first = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    family.end(
        ((first, 5.0), (signal.SIGTERM, 10.0)),
        console_event=True,
        hurry=lambda: signals.hurry,
    )
    logger.error("ended by %s", signal.Signals(number).name)
    return 1


def _failed(family: Family, failed: subprocess.Popen) -> int:
    code = failed.returncode
    deadline = time.monotonic() + FAILURE_GRACE_S
    while time.monotonic() < deadline and any(c.poll() is None for c in family.children):
        time.sleep(POLL_S / 4)
    for child in family.children:
        logger.info("Killing subprocess %d", child.pid)
    family.end(AFTER_FAILURE)
    name = ""
    if code < 0 and -code in set(signal.Signals):
        name = f" ({signal.Signals(-code).name})"
    logger.error("%s exits with return code = %d%s", failed.args, code, name)
    return exit_status(code)


def _cut_off(signals: Signals, number: int, why: str) -> None:
    logger.warning("ending this node's ranks: %s", why)
    signals.note(number)


def launch(args: argparse.Namespace) -> int:
    """Start the ranks that ``args`` describes and wait for them.

    Returns:
        0 when all ended well, else the status of the first that failed, 1 after a signal to us.

    Raises:
        ValueError: the arguments contradict each other or the world info.
        OSError: the program or the port cannot be used.
    """
    set_log_level_from_string("error" if args.quiet else args.log_level, logger)
    if args.world_info == "None":
        raise ValueError(
            explain("--world_info is required", fix="Start ranks with the deepspeed command.")
        )
    check_program(args.training_script, module=args.module, no_python=args.no_python)
    info = decode_world_info(args.world_info)
    world = World.build(info, args.node_rank)
    world.say(info)
    if world.node_rank == 0:
        check_port(args.master_port)
    if args.enable_elastic_training:
        from .elastic import launch_elastically

        with pid_file(args.save_pid):
            return launch_elastically(args, world)
    envs = world.environment(os.environ, args.master_addr, args.master_port)
    with Signals() as signals, pid_file(args.save_pid), ExitStack() as logs:
        if args.lifeline is not None:
            watch(args.lifeline, functools.partial(_cut_off, signals))
        family = Family(death_signal=signal.SIGTERM if WINDOWS else signal.SIGKILL)
        try:
            _start_ranks(args, envs, family, logs)
            status = _supervise(family, signals)
        except BaseException:
            family.end()
            raise
        family.release()
        return status


@contextmanager
def told_clearly(program: str) -> Iterator[None]:
    """Turn a user's mistake into one line on stderr and exit status 1, without a traceback."""
    try:
        yield
    except (DeepSpeedError, ValueError, RuntimeError, OSError, AssertionError) as error:
        if logger.isEnabledFor(10):
            raise
        sys.stdout.flush()
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def speak_any_script() -> None:
    """Let a path in letters that the console's encoding lacks be logged, not stop us."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run as a program; exits with the status of the first rank that fails."""
    speak_any_script()
    with told_clearly("deepspeed"):
        sys.exit(launch(parse_args()))


if __name__ == "__main__":
    main()
