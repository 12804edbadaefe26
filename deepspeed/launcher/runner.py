# SPDX-License-Identifier: Apache-2.0
"""The ``deepspeed`` command: finds the slots to use, and has launch.py start the ranks on them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import numa
from deepspeed.utils.command_line import as_typed
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger, set_log_level_from_string

from .arguments import ScriptParser, check_program
from .commands import launch_words
from .constants import (
    DEEPSPEED_ENVIRONMENT_NAME,
    DEFAULT_HOSTFILE,
    LAUNCHERS,
    NO_RANK_LOG,
    PDSH_LAUNCHER,
)
from .hostfile import (
    _parse_hostfile,
    encode_world_info,
    fetch_hostfile,
    parse_inclusion_exclusion,
    parse_resource_filter,
)
from .launch import VISIBLE_DEVICES, speak_any_script, told_clearly
from .nodes import EXPORT_ENVS, check_launcher, run_on_nodes
from .processes import POLL_S, WINDOWS, Family, Signals, exit_status

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME",
    "DLTS_HOSTFILE",
    "EXPORT_ENVS",
    "_parse_hostfile",
    "encode_world_info",
    "fetch_hostfile",
    "main",
    "parse_args",
    "parse_inclusion_exclusion",
    "parse_resource_filter",
    "run_autotuning",
]

DLTS_HOSTFILE = DEFAULT_HOSTFILE
LOCALHOST = "localhost"
LOCAL_ADDRESS = "127.0.0.1"

# longer than launch.py's own patience with the ranks, so that it can report
LAUNCH_PATIENCE_S = 20.0


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the ``deepspeed`` command line: launcher flags, then the script, then its arguments."""
    parser = ScriptParser(
        "user_script",
        "user_args",
        prog="deepspeed",
        usage="%(prog)s [flags] user_script [user_args...]",
        description="Run a training script as one process a device.",
        epilog="Flags after the script belong to the script.",
    )
    _add_resource_flags(parser)
    _add_run_flags(parser)
    parsed = parser.parse_args(args)
    parsed.launcher_chosen = parsed.launcher is not None
    parsed.launcher = parsed.launcher or PDSH_LAUNCHER
    return parsed


def _add_resource_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-H", "--hostfile", default=DEFAULT_HOSTFILE, help="lines HOST slots=NUMBER")
    add("-i", "--include", default="", help="use only HOST[:SLOT,...][@HOST...]")
    add("-e", "--exclude", default="", help="use all but HOST[:SLOT,...][@HOST...]")
    add("--num_nodes", type=int, default=-1, help="use the first N hosts")
    add("--min_elastic_nodes", type=int, default=-1, help="fewest nodes of an elastic run")
    add("--max_elastic_nodes", type=int, default=-1, help="most nodes of an elastic run")
    add(
        "--num_gpus",
        "--num_accelerators",
        type=int,
        default=-1,
        help="use slots 0 to N-1 of each node; without GPUs, start N ranks",
    )
    add("--master_port", type=int, default=TORCH_DISTRIBUTED_DEFAULT_PORT, help="rendezvous port")
    add("--master_addr", default="", help="address of the node of rank 0")
    add("--node_rank", type=int, default=-1, help="this node's index, with --no_ssh")
    add(
        "--launcher",
        help=f"for several nodes: {', '.join(LAUNCHERS)}; without it pdsh, or ssh where pdsh is missing",
    )
    add("--launcher_args", default="", help="words for that launcher's own command")
    add("--no_ssh", action="store_true", help="start only this node's ranks of a larger run")
    add("--no_ssh_check", action="store_true", help="do not try ssh before starting")
    add("--force_multi", action="store_true", help="go the way of several nodes with one as well")
    add("--ssh_port", type=int, default=None, help="ssh port of the nodes")
    add("--venv_script", default=None, help="script that remote nodes source first")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--module", action="store_true", help="run the script as python -m does")
    add("--no_python", action="store_true", help="run the script itself, without Python")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank to the script")
    add("--save_pid", action="store_true", help="write <temp>/<our pid>.deepspeed while running")
    add("--enable_each_rank_log", default=NO_RANK_LOG, help="folder for one log file a rank")
    add("--autotuning", default="", choices=["", "tune", "run"], help="search for a configuration")
    add("--elastic_training", action="store_true", help="let ranks come and go")
    add("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    add("--bind_core_list", default=None, help="cores to share out, such as 0-7,12-19")
    add("--log_level", default="info", help="debug, info, warning, error or critical")
    add("-q", "--quiet", action="store_true", help="the same as --log_level error")


def run_autotuning(args: argparse.Namespace, active_resources: Mapping[str, list[int]]) -> int:
    """Search for the best configuration; with ``--autotuning run`` train with it then.

    Returns:
        0, the status of that training, or 1 when no experiment succeeded.
    """
    from deepspeed.autotuning.autotuner import Autotuner

    tuner = Autotuner(args, active_resources)
    found = tuner.tune()
    tuner.print_tuning_results()
    tuner.write_optimal_config()
    if found is None:
        logger.error("autotuning: no experiment succeeded; see %s", tuner.results_dir)
        return 1
    return tuner.run_after_tuning() if args.autotuning == "run" else 0


def _search(args: argparse.Namespace) -> int:
    """Check the command line as `run` does, and search; a signal ends the experiment and the search."""
    active = select_resources(args)
    if not _on_other_nodes(args, active):
        check_program(args.user_script, module=args.module, no_python=args.no_python)

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    return run_autotuning(args, active)


def _torch_is_cpu_only() -> bool:
    """Say whether the installed torch has no GPU support, without the second that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return False
    try:
        facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except Exception:  # a torch of another make: ask it itself
        return False
    return "cuda" in facts and not (facts["cuda"] or facts.get("hip"))


def _local_slots() -> tuple[str, int]:
    """Return the accelerator's name and how many slots it gives this machine."""
    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen == "cpu" or (not chosen and _torch_is_cpu_only()):
        return "cpu", int(os.environ.get("LOCAL_SIZE") or 0) or len(numa.get_numa_cores())
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name(), get_accelerator().device_count()


def _apply_visible_devices(args: argparse.Namespace) -> None:
    """Turn CUDA_VISIBLE_DEVICES into an include filter: our numbers are those of all the devices."""
    visible = os.environ.get(VISIBLE_DEVICES)
    if visible is None:
        return
    if visible.strip() in ("", "-1"):  # hidden on purpose; the ranks must not see them either
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return
    if args.include or args.exclude or args.num_gpus > 0 or args.num_nodes > 0:
        logger.warning(
            "%s=%s is ignored, because --include, --exclude, --num_gpus or --num_nodes is given; "
            "to use it, give none of them",
            VISIBLE_DEVICES,
            visible,
        )
        return
    if not all(part.strip().isdigit() for part in visible.split(",")):
        raise ValueError(
            explain(
                f"{VISIBLE_DEVICES} must name devices by number",
                got=visible,
                expected="such as 0,1",
                fix="Replace identifiers by the indices that nvidia-smi shows.",
            )
        )
    args.include = f"{LOCALHOST}:{visible.replace(' ', '')}"
    del os.environ[VISIBLE_DEVICES]


def _local_pool(args: argparse.Namespace) -> dict[str, int]:
    """Return this machine as the only host.

    A GPU's slot is a device. A CPU's is only a number, so that more ranks than sockets may be asked for:
    by ``--num_gpus`` as many as wanted, by slot numbers as many as there are cores.
    """
    given = args.include
    if os.environ.get("DS_ACCELERATOR") != "cpu" and not _torch_is_cpu_only():
        _apply_visible_devices(args)
    name, slots = _local_slots()
    if slots < 1:
        raise RuntimeError(
            explain(
                f"this machine has no device of accelerator {name!r}",
                fix="Set DS_ACCELERATOR=cpu to run on the CPU.",
            )
        )
    if name == "cpu":
        args.include = given
        if given:
            slots = max(slots, os.cpu_count() or 1)
    elif args.num_gpus > slots:
        raise ValueError(
            explain(
                "more GPUs are asked for than there are",
                got=f"--num_gpus {args.num_gpus}",
                expected=f"at most {slots}",
            )
        )
    return {LOCALHOST: slots}


def _check_counts(args: argparse.Namespace) -> None:
    filtered = bool(args.include or args.exclude)
    for flag, value in (("--num_nodes", args.num_nodes), ("--num_gpus", args.num_gpus)):
        if value > 0 and filtered:
            raise ValueError(
                explain(
                    f"{flag} cannot be combined with --include or --exclude",
                    got=f"{flag} {value} and {args.include or args.exclude}",
                    fix="Say it all in the filter, or drop it.",
                )
            )
        if value == 0:
            logger.warning("%s 0 asks for nothing and is ignored", flag)
        if value < -1:
            raise ValueError(explain(f"bad {flag}", got=value, expected="at least 1"))


def select_resources(args: argparse.Namespace) -> dict[str, list[int]]:
    """Return the slots to use on each host.

    Raises:
        ValueError: flags contradict each other, or name hosts or slots that are not there.
        FileNotFoundError: a hostfile was named that is not there.
        RuntimeError: this machine has no device.
    """
    if args.hostfile != DEFAULT_HOSTFILE and not Path(args.hostfile).is_file():
        raise FileNotFoundError(
            explain(
                f"there is no hostfile {args.hostfile!r}",
                got=f"directory {os.getcwd()}",
                fix="Correct --hostfile, or drop it to use this machine only.",
            )
        )
    _check_counts(args)
    pool = fetch_hostfile(args.hostfile)
    if not pool and args.num_nodes > 1:
        raise ValueError(
            explain(
                "Num nodes is >1 but no extra nodes available via hostfile",
                got=f"--num_nodes {args.num_nodes}",
                fix="Name the hosts in a --hostfile.",
            )
        )
    pool = pool or _local_pool(args)
    active = parse_inclusion_exclusion(pool, args.include, args.exclude)
    if args.num_nodes > len(active):
        raise ValueError(
            explain(
                "more nodes are asked for than the hostfile has",
                got=f"--num_nodes {args.num_nodes}",
                expected=f"at most {len(active)}",
            )
        )
    if args.num_nodes > 0:
        active = dict(list(active.items())[: args.num_nodes])
    if args.num_gpus > 0:
        active = {host: list(range(args.num_gpus)) for host in active}
    if not any(active.values()):
        raise ValueError(
            explain(
                "no slot is left to run on",
                got=f"--exclude {args.exclude}" if args.exclude else repr(pool),
                fix="Leave at least one slot.",
            )
        )
    return active


def _on_other_nodes(args: argparse.Namespace, active: Mapping[str, list[int]]) -> bool:
    """Say whether ranks have to be started elsewhere; refuse flags that do not go with the answer."""
    if args.no_ssh:
        if not 0 <= args.node_rank < len(active) or not args.master_addr:
            raise ValueError(
                explain(
                    "--no_ssh needs to know this node's place",
                    got=f"--node_rank {args.node_rank} --master_addr {args.master_addr or 'unset'}",
                    expected=f"--node_rank 0 to {len(active) - 1}, and --master_addr of node 0",
                )
            )
    elif len(active) > 1 or args.force_multi:
        return True
    if args.venv_script is not None:
        raise ValueError(
            explain(
                "--venv_script concerns several nodes only",
                got=f"--venv_script {args.venv_script} on one node",
                fix="Activate the environment here, and drop the flag.",
            )
        )
    return False


def _check_elastic(args: argparse.Namespace, nodes: int) -> None:
    """Fill in the limits of an elastic run, and refuse those that cannot be."""
    if not args.elastic_training:
        return
    if args.min_elastic_nodes == -1:
        args.min_elastic_nodes = 1
    if args.max_elastic_nodes == -1:
        args.max_elastic_nodes = nodes
    if not 1 <= args.min_elastic_nodes <= min(args.max_elastic_nodes, nodes):
        raise ValueError(
            explain(
                "impossible numbers of elastic nodes",
                got=f"--min_elastic_nodes {args.min_elastic_nodes} "
                f"--max_elastic_nodes {args.max_elastic_nodes} on {nodes} nodes",
                expected="1 <= min <= max, and at least min nodes",
            )
        )


def launch_command(args: argparse.Namespace, active: Mapping[str, list[int]]) -> list[str]:
    """Return the command that starts this node's ranks."""
    args.master_addr = args.master_addr or LOCAL_ADDRESS
    node_rank = str(args.node_rank) if args.no_ssh else None
    words = launch_words(args, encode_world_info(active), node_rank=node_rank)
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", *words]
    return [*command, args.user_script, *args.user_args]


def _run(command: Sequence[str], signals: Signals) -> int:
    """Run launch.py to its end, pass signals on to it, and see that nothing of it stays."""
    family = Family()
    passed: float | None = None
    try:
        child = family.start(command, os.environ)
        while child.poll() is None:
            if signals.received is not None and passed is None:
                passed = time.monotonic()
                if not WINDOWS:  # there the console has told every process already
                    child.send_signal(signals.received)
            if passed is not None and (
                signals.hurry or time.monotonic() - passed > LAUNCH_PATIENCE_S
            ):
                break
            time.sleep(POLL_S / 2)
    except BaseException:
        family.end()
        raise
    if child.returncode is None or child.returncode < 0:  # it could not clean up itself
        family.end(((signal.SIGTERM, 1.0),))
        return exit_status(child.returncode or 1)
    family.release()
    return exit_status(child.returncode)


def run(args: argparse.Namespace) -> int:
    """Start the ranks that the command line asks for, and wait for them.

    Returns:
        0 when all ended well, else the first failing rank's status (128+n for signal n).

    Raises:
        ValueError: flags contradict each other, or name what is not there.
        FileNotFoundError: the script or the hostfile is not there.
        NotImplementedError: a flag's feature is not built yet.
        RuntimeError: this machine has no device, or other nodes cannot be reached.
    """
    if args.quiet:
        args.log_level = "error"
    set_log_level_from_string(args.log_level, logger)
    check_launcher(args)
    if args.autotuning:
        return _search(args)
    with Signals() as signals:
        active = select_resources(args)
        elsewhere = _on_other_nodes(args, active)
        _check_elastic(args, len(active))
        if elsewhere:
            return run_on_nodes(args, active, signals)
        check_program(args.user_script, module=args.module, no_python=args.no_python)
        command = launch_command(args, active)
        logger.info("cmd = %s", as_typed(command))
        return _run(command, signals) if signals.received is None else 1


def run_told_clearly(words: Sequence[str], program: str) -> int:
    """Run a command line for another command of ours; a mistake is one clear line of that command."""
    status = 1
    speak_any_script()
    with told_clearly(program):
        status = run(parse_args(words))
    return status


def main(args: Sequence[str] | None = None) -> None:
    """The ``deepspeed`` command.

    Args:
        args: its words; None takes those of this process, and turns mistakes into one clear line.

    Raises:
        SystemExit: with the first failing rank's status.
    """
    status = run_told_clearly(sys.argv[1:], "deepspeed") if args is None else run(parse_args(args))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
