# SPDX-License-Identifier: Apache-2.0
"""Command lines that start ranks on several nodes: one class for each program that can do it.

A runner only writes the command. Words that a remote shell will read (pdsh) are quoted for it; those that
go straight into a program are not. (Plain ssh is a runner of its own: `deepspeed.launcher.ssh`.)
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from deepspeed.utils import numa
from deepspeed.utils.errors import explain

from .commands import launch_words, split_words
from .constants import (
    IMPI_LAUNCHER,
    MPICH_LAUNCHER,
    MVAPICH_LAUNCHER,
    OPENMPI_LAUNCHER,
    PDSH_LAUNCHER,
    PDSH_MAX_FAN_OUT,
    SLURM_LAUNCHER,
)

MVAPICH_TMP_HOSTFILE = str(Path(tempfile.gettempdir()) / "deepspeed_mvapich_hostfile")
_HELPER = str(Path(__file__).with_name("launcher_helper.py"))


class MultiNodeRunner(ABC):
    """Writes the command of one backend. Subclass it to add a backend of your own.

    Args:
        args: what `deepspeed.launcher.runner.parse_args` returned.
        world_info_base64: hosts and slots, as `encode_world_info` writes them.
        resource_pool: number of slots of each host.
    """

    takes_filters = True  # MPI does not: it reads the hostfile itself

    def __init__(
        self,
        args: argparse.Namespace,
        world_info_base64: str,
        resource_pool: Mapping[str, int] | None = None,
    ) -> None:
        self.args = args
        self.world_info_base64 = world_info_base64
        self.resource_pool = dict(resource_pool or {})
        self.user_script = args.user_script
        self.user_arguments = self.parse_user_args()
        self.variables: dict[str, str] = {}  # as they are
        # as words of a POSIX shell, for backends of other authors
        self.exports: dict[str, str] = {}
        self.validate_args()

    @property
    def name(self) -> str:
        """The backend's name in messages and in ``--launcher``."""
        return type(self).__name__

    @abstractmethod
    def backend_exists(self) -> bool:
        """Say whether the backend's program is installed here."""

    @abstractmethod
    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> list[str] | tuple[list[str], list[str], MutableMapping[str, str]]:
        """Return the command that starts the ranks (pdsh: and the one that ends them, and its environment)."""

    def add_export(self, key: str, var: str) -> None:
        """Have the ranks see ``key=var`` in their environment.

        Raises:
            ValueError: ``key`` is no name of a variable.
        """
        if not key.strip().isidentifier() or not key.isascii():
            raise ValueError(
                explain("not a name of an environment variable", got=repr(key), expected="NAME")
            )
        self.variables[key.strip()] = var.strip()
        self.exports[key.strip()] = _double_quoted(var.strip())

    def parse_user_args(self) -> list[str]:
        """Return the script's arguments."""
        return list(self.args.user_args)

    def validate_args(self) -> None:
        """Refuse flags that the backend cannot honour.

        Raises:
            ValueError: there is such a flag.
        """
        args = self.args
        if self.takes_filters:
            return
        if args.include or args.exclude:
            what, got = "worker include/exclusion", args.include or args.exclude
        elif args.num_nodes > 0 or args.num_gpus > 0:
            what, got = "limiting num nodes/gpus", f"{args.num_nodes} nodes, {args.num_gpus} gpus"
        else:
            return
        fix = "Leave the flag out, and list what to use in the hostfile."
        raise ValueError(explain(f"{self.name} backend does not support {what}", got=got, fix=fix))

    def _slots_per_node(self, pool: Mapping[str, int] | None = None) -> int:
        pool = self.resource_pool if pool is None else pool
        if len(set(pool.values())) != 1:
            raise ValueError(
                explain(
                    f"{self.name} requires same number of devices per node",
                    got=repr(dict(pool)),
                    fix="Give each host of the hostfile the same number of slots.",
                )
            )
        return next(iter(pool.values()))

    def _total(self) -> int:
        return sum(self.resource_pool.values())

    def _launcher_words(self) -> list[str]:
        return split_words(self.args.launcher_args)

    def _script_words(self) -> list[str]:
        python = [] if self.args.no_python else [sys.executable, "-u"]
        module = ["-m"] if self.args.module else []
        return [*python, *module, self.user_script, *self.user_arguments]


class PDSHRunner(MultiNodeRunner):
    """Starts `deepspeed.launcher.launch` on each node through ssh."""

    name = PDSH_LAUNCHER

    def backend_exists(self) -> bool:
        return shutil.which("pdsh") is not None

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> tuple[list[str], list[str], MutableMapping[str, str]]:
        args = self.args
        environment["PDSH_RCMD_TYPE"] = "ssh"
        if args.ssh_port is not None:
            given = environment.get("PDSH_SSH_ARGS_APPEND", "")
            environment["PDSH_SSH_ARGS_APPEND"] = f"{given} -p {args.ssh_port}".strip()
        pdsh = ["pdsh", "-S", "-f", str(PDSH_MAX_FAN_OUT), "-w", ",".join(active_resources)]
        pdsh += self._launcher_words()
        remote = [f"source {_quoted(args.venv_script)};"] if args.venv_script else []
        remote += [f"export {key}={_quoted(value)};" for key, value in self.variables.items()]
        remote += [f"cd {_quoted(os.getcwd())};", _quoted(sys.executable)]
        remote += ["-u", "-m", "deepspeed.launcher.launch"]
        flags = launch_words(args, self.world_info_base64, node_rank="%n", lifeline=0)
        remote += [word if word == "--node_rank=%n" else _quoted(word) for word in flags]
        remote += [_quoted(word) for word in (self.user_script, *self.user_arguments)]
        # only the program itself, not the shells that carry it or this pattern; the address and the port
        # tell this job from others on the same nodes
        pattern = (
            f"^{re.escape(sys.executable)} -u -m deepspeed[.]launcher[.]launch "
            f"--world_info={self.world_info_base64} "
            f"--node_rank=[0-9]+ --master_addr={args.master_addr} --master_port={args.master_port} "
        )
        return [*pdsh, *remote], [*pdsh, "pkill", "-f", _quoted(pattern)], environment


def _quoted(word: str) -> str:
    """Quote a word for the remote shell, and its percent signs for pdsh (which fills in %n and %h)."""
    return shlex.quote(word).replace("%", "%%")


def _double_quoted(value: str) -> str:
    """A word that a POSIX shell reads as ``value``: in double quotes where it has to be."""
    if shlex.quote(value) == value:
        return value
    return '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'


class OpenMPIRunner(MultiNodeRunner):
    """Starts the script under Open MPI; ranks find their numbers through MPI."""

    name = OPENMPI_LAUNCHER
    takes_filters = False

    def __init__(
        self, args: argparse.Namespace, world_info_base64: str, resource_pool: Mapping[str, int]
    ) -> None:
        super().__init__(args, world_info_base64, resource_pool)
        self.add_export("UCX_TLS", "tcp")

    def backend_exists(self) -> bool:
        return shutil.which("ompi_info") is not None

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> list[str]:
        extra = self._launcher_words()
        command = ["mpirun", "-n", str(self._total()), "-hostfile", self.args.hostfile]
        command += ["--mca", "btl", "^openib"]
        if "btl_tcp_if_include" not in extra:
            command += ["--mca", "btl_tcp_if_include", "eth0"]
        command += extra
        for key, value in self.variables.items():
            command += ["-x", f"{key}={value}"]
        return command + self._script_words()


class MPICHRunner(MultiNodeRunner):
    """Starts the script under MPICH, by way of a helper that names ranks as torch expects."""

    name = MPICH_LAUNCHER
    takes_filters = False

    def backend_exists(self) -> bool:
        return shutil.which("mpirun") is not None

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> list[str]:
        args, each = self.args, self._slots_per_node()
        command = ["mpirun", "-n", str(self._total()), "-ppn", str(each), *self._launcher_words()]
        for key, value in self.variables.items():
            command += ["-genv", f"{key}={value}"]
        command += _genv(args, self._total(), each)
        command += ["-hosts", ",".join(self.resource_pool), sys.executable, "-u", _HELPER]
        command += ["--launcher", self.name]
        command += [f"--{flag}" for flag in ("module", "no_python") if getattr(args, flag)]
        return [*command, self.user_script, *self.user_arguments]


class IMPIRunner(MultiNodeRunner):
    """Starts the script under Intel MPI, each rank with its own numbers and cores."""

    name = IMPI_LAUNCHER
    takes_filters = False

    def backend_exists(self) -> bool:
        return shutil.which("mpirun") is not None

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> list[str]:
        args, each = self.args, self._slots_per_node()
        command = ["mpirun", "-ppn", str(each), *self._launcher_words()]
        for key, value in self.variables.items():
            command += ["-genv", key, value]
        command += [*_genv(args, self._total(), each), "-genv", "I_MPI_PIN", "0"]
        if args.bind_cores_to_rank:
            cores, _ = numa.get_numactl_cmd(args.bind_core_list, each, 0)
            command += ["-genv", "OMP_NUM_THREADS", str(cores)]
        command += ["-hosts", ",".join(self.resource_pool)]
        for rank in range(self._total()):
            local = rank % each
            command += [":"] if rank else []
            command += ["-n", "1", "-env", "RANK", str(rank), "-env", "LOCAL_RANK", str(local)]
            if args.bind_cores_to_rank:
                command += numa.get_numactl_cmd(args.bind_core_list, each, local)[1]
            command += self._script_words()
        return command


def _genv(args: argparse.Namespace, total: int, each: int) -> list[str]:
    """What torch's rendezvous needs, in the words of MPICH and its kin."""
    values = {
        "MASTER_ADDR": args.master_addr,
        "MASTER_PORT": args.master_port,
        "WORLD_SIZE": total,
        "LOCAL_SIZE": each,
    }
    return [word for key, value in values.items() for word in ("-genv", key, str(value))]


class SlurmRunner(MultiNodeRunner):
    """Starts the script as tasks of a Slurm job."""

    name = SLURM_LAUNCHER

    def backend_exists(self) -> bool:
        return shutil.which("sinfo") is not None

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> list[str]:
        args = self.args
        pool = {host: len(slots) for host, slots in _as_slots(active_resources).items()}
        each = self._slots_per_node(pool)
        command = ["srun", "-n", str(sum(pool.values())), "--kill-on-bad-exit=1"]
        command += self._launcher_words()
        if getattr(args, "slurm_comment", ""):
            command += ["--comment", args.slurm_comment]
        if args.include or args.exclude or args.num_nodes > 0:
            command += ["--nodelist", ",".join(pool), "--nodes", str(len(pool))]
        if args.num_gpus > 0:
            command += ["--gpus-per-node", str(each)]
        # a comma would start another variable, a quote or backslash means something to srun: such
        # values go by srun's own environment, of which ALL is exported
        exports = ""
        for key, value in self.variables.items():
            if set(value) & set(",'\"\\\n"):
                environment[key] = value
            else:
                exports += f",{key}={value}"
        return [*command, f"--export=ALL{exports}", *self._script_words()]


def _as_slots(resources: Mapping[str, list[int] | int]) -> dict[str, list[int]]:
    """Accept a pool (numbers of slots) where a selection (slots) is meant."""
    return {
        host: list(range(slots)) if isinstance(slots, int) else slots
        for host, slots in resources.items()
    }


class MVAPICHRunner(MultiNodeRunner):
    """Starts the script under MVAPICH2-GDR."""

    name = MVAPICH_LAUNCHER
    takes_filters = False

    def __init__(
        self, args: argparse.Namespace, world_info_base64: str, resource_pool: Mapping[str, int]
    ) -> None:
        super().__init__(args, world_info_base64, resource_pool)
        self.add_export("MV2_SMP_USE_CMA", "0")
        self.add_export("MV2_DEBUG_SHOW_BACKTRACE", "1")
        if os.environ.get("DS_ACCELERATOR") != "cpu":
            self.add_export("MV2_USE_CUDA", "1")
        self.add_export("MV2_SUPPORT_DL", "1")
        self.add_export("MV2_ENABLE_AFFINITY", "0")
        self.add_export("MV2_INTER_ALLGATHER_TUNING", "5")
        self.add_export("MV2_CUDA_USE_NAIVE", "0")

    def backend_exists(self) -> bool:
        if shutil.which("mpiname") is None:
            return False
        told = subprocess.run(["mpiname"], capture_output=True, encoding="utf-8", errors="replace")
        return "MVAPICH2-GDR" in told.stdout

    def get_cmd(
        self, environment: MutableMapping[str, str], active_resources: Mapping[str, list[int]]
    ) -> list[str]:
        each = self._slots_per_node()
        hosts = "".join(f"{host}\n" for host in self.resource_pool)
        Path(MVAPICH_TMP_HOSTFILE).write_text(hosts, encoding="utf-8")
        command = ["mpirun", "-np", str(self._total()), "-ppn", str(each)]
        command += ["--hostfile", MVAPICH_TMP_HOSTFILE, *self._launcher_words()]
        for key, value in self.variables.items():
            command += ["-env", f"{key}={value}"]
        return command + self._script_words()
