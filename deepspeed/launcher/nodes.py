# SPDX-License-Identifier: Apache-2.0
"""A job on several nodes: what goes along to them, how they are reached, and how all of it ends."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from deepspeed.utils.command_line import as_typed
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from . import ssh
from .commands import split_words
from .constants import (
    DEEPSPEED_ENVIRONMENT_NAME,
    IMPI_LAUNCHER,
    LAUNCHERS,
    MPICH_LAUNCHER,
    MVAPICH_LAUNCHER,
    OPENMPI_LAUNCHER,
    PDSH_LAUNCHER,
    SLURM_LAUNCHER,
    SSH_LAUNCHER,
)
from .fleet import PATIENCE_S, Fleet
from .hostfile import encode_world_info
from .multinode_runner import (
    IMPIRunner,
    MPICHRunner,
    MultiNodeRunner,
    MVAPICHRunner,
    OpenMPIRunner,
    PDSHRunner,
    SlurmRunner,
)
from .processes import POLL_S, WINDOWS, Family, Signals, exit_status, wait_all

RUNNERS: dict[str, type[MultiNodeRunner]] = {
    PDSH_LAUNCHER: PDSHRunner,
    OPENMPI_LAUNCHER: OpenMPIRunner,
    MPICH_LAUNCHER: MPICHRunner,
    IMPI_LAUNCHER: IMPIRunner,
    SLURM_LAUNCHER: SlurmRunner,
    MVAPICH_LAUNCHER: MVAPICHRunner,
}
# the backends whose ranks ask MPI or Slurm for their numbers: the address must come from us
_UNNUMBERED = (OPENMPI_LAUNCHER, SLURM_LAUNCHER, MVAPICH_LAUNCHER)

# names, or their beginnings, of what goes along: Python's, the transports', the services', our own; programs that call
# the launcher append theirs
EXPORT_ENVS = ["MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "NEBULA", "DS_", "DEEPSPEED_"]
CARRIED_NAMES = frozenset({"DLTS_JOB_ID", "DLTS_NUM_WORKER", "AML_RUN_ID", "AZUREML_RUN_ID"})
_ONLY_HERE = frozenset({"DS_ENV_FILE"})
_AISC_OWN = frozenset({"NCCL_IB_HCA", "UCX_NET_DEVICES"})  # its scheduler sets them on each node
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PDSH_FAILURE = re.compile(r"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


def carried_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what of our environment the ranks on other nodes see, the env files' lines included.

    Raises:
        ValueError: an env file has a line that is not ``NAME=VALUE``.
    """
    own = _AISC_OWN if "AISC_JOB_NAME" in environment else frozenset()
    carried = {
        name: value
        for name, value in environment.items()
        if (name.startswith(tuple(EXPORT_ENVS)) or name in CARRIED_NAMES)
        and name not in own | _ONLY_HERE
        and _NAME.fullmatch(name)
    }
    path = [os.getcwd(), *filter(None, [environment.get("PYTHONPATH")])]
    carried["PYTHONPATH"] = os.pathsep.join(path)
    file = environment.get("DS_ENV_FILE") or DEEPSPEED_ENVIRONMENT_NAME
    for folder in (Path.home(), Path.cwd()):
        carried.update(read_env_file(folder / file))
    return carried


def read_env_file(path: Path) -> dict[str, str]:
    """Read lines ``NAME=VALUE``, or ``export NAME=VALUE``; blank ones and comments are skipped.

    A name that is none for a shell is left out with a warning: other programs write down whole
    environments.

    Raises:
        ValueError: a line has no equals sign.
    """
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.removeprefix("export ").partition("=")
        if not equals:
            raise ValueError(
                explain(
                    f"the environment file {path} has a bad line",
                    got=f"line {number}: {text}",
                    expected="NAME=VALUE",
                    fix="Correct the line, or start it with # to leave it out.",
                )
            )
        if _NAME.fullmatch(name.strip()):
            found[name.strip()] = value.strip()
        else:
            logger.warning("%s, line %d: %r is no name of a variable", path, number, name)
    return found


def check_launcher(args: argparse.Namespace) -> str:
    """Return the name of the backend that is asked for.

    Raises:
        NotImplementedError: there is no backend of that name.
    """
    name = args.launcher.lower()
    if name not in LAUNCHERS:
        raise NotImplementedError(
            explain("unknown launcher", got=args.launcher, expected=", ".join(LAUNCHERS))
        )
    return name


def choose_launcher(args: argparse.Namespace) -> str:
    """Return the backend: the one asked for, else pdsh, else (where that is missing) ssh alone.

    Raises:
        NotImplementedError: there is no backend of that name.
    """
    name = check_launcher(args)
    if name == PDSH_LAUNCHER and not args.launcher_chosen and shutil.which("pdsh") is None:
        logger.info("pdsh is not installed: nodes are reached through ssh alone")
        return SSH_LAUNCHER
    return name


def _check_installed(launcher: str, runner: MultiNodeRunner | None) -> None:
    if ssh.backend_exists() if runner is None else runner.backend_exists():
        return
    program = "an OpenSSH client" if runner is None else "it, or use --launcher ssh"
    raise RuntimeError(
        explain(
            f"launcher '{launcher}' not installed",
            got=f"--launcher {launcher}",
            fix=f"Install {program}.",
        )
    )


def _ssh_options(args: argparse.Namespace, launcher: str) -> list[str]:
    """Return the options that the user gave to ssh, wherever this launcher takes them from."""
    if launcher == SSH_LAUNCHER:
        return split_words(args.launcher_args)
    if launcher == PDSH_LAUNCHER:
        return split_words(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return []


def _reach(args: argparse.Namespace, launcher: str, hosts: Sequence[str]) -> None:
    """Check that nodes answer, and fill in the master address."""
    words = ssh.ssh_words(args.ssh_port, _ssh_options(args, launcher))
    if launcher == SLURM_LAUNCHER:  # it has ways of its own to its nodes
        args.master_addr = args.master_addr or hosts[0]
        return
    if not args.no_ssh_check:
        by_ssh = launcher in (SSH_LAUNCHER, PDSH_LAUNCHER)
        ssh.probe(list(hosts) if by_ssh else hosts[:1], words)
    if not args.master_addr:
        args.master_addr = ssh.master_address(hosts[0], words)
        logger.info("Using IP address of %s for node %s", args.master_addr, hosts[0])


def run_on_nodes(
    args: argparse.Namespace, active: Mapping[str, list[int]], signals: Signals
) -> int:
    """Start the ranks on all nodes and wait for them; when one node fails, end the others.

    Args:
        args: the ``deepspeed`` command line.
        active: slots of each host.
        signals: what asks us to stop.

    Returns:
        0 when all ended well, else the status of a node that failed; 1 after a signal.

    Raises:
        ValueError: flags, hosts or env files are not usable.
        NotImplementedError: there is no such launcher.
        RuntimeError: the launcher is not installed, or nodes cannot be reached.
    """
    launcher = choose_launcher(args)
    hosts = list(active)
    ssh.check_hosts(hosts)
    exports = carried_environment(os.environ)
    runner = None
    if launcher != SSH_LAUNCHER:
        pool = {host: len(slots) for host, slots in active.items()}
        runner = RUNNERS[launcher](args, encode_world_info(active), pool)
    _check_installed(launcher, runner)
    _reach(args, launcher, hosts)
    if signals.received is not None:
        return 1
    if runner is None:
        return _run_by_ssh(args, active, exports, signals)
    if launcher in _UNNUMBERED:
        exports = {
            **exports,
            "MASTER_ADDR": args.master_addr,
            "MASTER_PORT": str(args.master_port),
        }
    for name, value in exports.items():
        runner.add_export(name, value)
    environment = dict(os.environ)
    made = runner.get_cmd(environment, active)
    if isinstance(made, tuple):
        return _run_by_pdsh(args, made, hosts, signals)
    logger.info("cmd = %s", as_typed(made))
    return _run_by_backend(made, environment, signals)


def _tolerated(args: argparse.Namespace, nodes: int) -> int:
    """Return how many nodes may fail: none, or as many as an elastic job can spare."""
    if not args.elastic_training:
        return 0
    return max(0, nodes - max(1, args.min_elastic_nodes))


def _run_by_ssh(
    args: argparse.Namespace,
    active: Mapping[str, list[int]],
    exports: Mapping[str, str],
    signals: Signals,
) -> int:
    commands = ssh.node_commands(args, encode_world_info(active), list(active), exports)
    fleet = Fleet(signals, tolerated=_tolerated(args, len(active)), mend=ssh.lost)
    for host, command, hello in commands:
        logger.info("cmd on %s = %s %s", host, args.user_script, as_typed(args.user_args))
        logger.debug("by %s", as_typed(command))
        fleet.start(host, command, hello)
    return fleet.wait()


class _Complaints:
    """pdsh's standard error, passed on, and the first node that it says has failed."""

    def __init__(self, pdsh: subprocess.Popen) -> None:
        self.failed: tuple[str, int] | None = None
        self.count = 0
        self._thread = threading.Thread(target=self._read, args=(pdsh.stderr,), daemon=True)
        self._thread.start()

    def _read(self, lines: object) -> None:
        for line in lines:  # type: ignore[attr-defined]
            text = line.decode("utf-8", errors="replace")
            if found := _PDSH_FAILURE.match(text):
                self.count += 1
                self.failed = self.failed or (found[1], int(found[2]))
            sys.stderr.write(text)
            sys.stderr.flush()

    def drain(self) -> None:
        self._thread.join(timeout=2.0)


def _run_by_pdsh(
    args: argparse.Namespace,
    made: tuple[list[str], list[str], MutableMapping[str, str]],
    hosts: Sequence[str],
    signals: Signals,
) -> int:
    """Run pdsh; it waits for every node whatever happens to one, so we watch what it says."""
    command, kill, environment = made
    given = environment.get("PDSH_SSH_ARGS_APPEND", "")
    environment["PDSH_SSH_ARGS_APPEND"] = f"{given} {' '.join(ssh.KEEP_ALIVE)}".strip()
    logger.info("cmd = %s", as_typed(command))
    family = Family()
    tolerated = _tolerated(args, len(hosts))
    try:
        pdsh = family.start(command, environment, errors_to_us=True, own_session=True)
        said = _Complaints(pdsh)
        while pdsh.poll() is None and signals.received is None and said.count <= tolerated:
            time.sleep(POLL_S / 2)
        if pdsh.poll() is None:
            _end_nodes(pdsh, kill, environment, signals)
        said.drain()
    finally:
        family.end(((signal.SIGTERM, 2.0),))
    if _ended_by_signal(signals):
        return 1
    if said.failed is not None and said.count > tolerated:
        host, status = said.failed
        logger.error("node %s ended with status %d; all nodes were ended", host, status)
        return status or 1
    return 0 if said.count else exit_status(pdsh.returncode)


def _end_nodes(
    pdsh: subprocess.Popen, kill: Sequence[str], environment: Mapping[str, str], signals: Signals
) -> None:
    """Ask each node's launch.py to end; whoever does not hear it is told by the end of pdsh."""
    logger.info("ending all nodes")
    killer = subprocess.Popen(
        list(kill),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if not wait_all([pdsh], PATIENCE_S, lambda: signals.hurry):
        pdsh.terminate()
    if killer.poll() is None:
        killer.kill()
    killer.wait()


def _run_by_backend(
    command: Sequence[str], environment: Mapping[str, str], signals: Signals
) -> int:
    """Run mpirun or srun, which end all ranks when one fails, and pass signals on to it."""
    family = Family()
    try:
        child = family.start(command, environment, own_session=True)
        while child.poll() is None and signals.received is None:
            time.sleep(POLL_S / 2)
        if child.poll() is None:
            _ask(child, signals)
    finally:
        family.end(((signal.SIGTERM, 2.0),))
    return 1 if _ended_by_signal(signals) else exit_status(child.returncode)


def _ended_by_signal(signals: Signals) -> bool:
    """Say whether a signal asked us to stop; the log hears which."""
    if signals.received is None:
        return False
    logger.error("ended by %s", signal.Signals(signals.received).name)
    return True


def _ask(child: subprocess.Popen, signals: Signals) -> None:
    """Signal a backend until it ends: srun takes a first SIGINT for a question about its state."""
    if WINDOWS:  # it has no signals; the job object ends all of it
        return
    for number, seconds in ((signals.received, 2.0), (signal.SIGTERM, PATIENCE_S)):
        child.send_signal(number or signal.SIGTERM)
        if wait_all([child], seconds, lambda: signals.hurry):
            return
