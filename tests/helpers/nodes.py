# SPDX-License-Identifier: Apache-2.0
"""Several "nodes" on one machine: a real sshd on a high port of all loopback addresses, or of network namespaces.

Everything is made for the occasion: host key, user key, configuration. Nothing of the user's ssh is read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.launching import free_port

HOSTS = ("127.0.0.1", "127.0.0.2")


def program(name: str) -> str:
    """The path of a system program; skips the test where it is not installed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class Sshd:
    """Keys and configuration of both sides, and the daemons that were started with them."""

    def __init__(self, folder: Path) -> None:
        if sys.platform != "linux":
            pytest.skip("127.0.0.2 is a second address of this machine on Linux only")
        self.program, self.folder, self.port = program("sshd"), folder, free_port()
        self.config, self.key = folder / "config", folder / "id"
        self._daemons: list[subprocess.Popen] = []
        for name in ("hostkey", "id", "stranger"):
            keygen = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(keygen, check=True)
        shutil.copy(folder / "id.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nHostKey {folder}/hostkey\nPidFile none\nStrictModes no\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n",
            encoding="utf-8",
        )
        self.config.write_text(
            f"Host *\n  Port {self.port}\n  IdentityFile {self.key}\n  IdentitiesOnly yes\n"
            f"  StrictHostKeyChecking no\n  UserKnownHostsFile {folder}/known_hosts\n  LogLevel ERROR\n",
            encoding="utf-8",
        )

    def serve(self, prefix: Sequence[str] = (), host: str = HOSTS[0]) -> None:
        """Start a daemon, under ``prefix`` (a command that enters another namespace)."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines itself
        words = [self.program, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        log = (self.folder / "log").open("ab")
        self._daemons.append(
            subprocess.Popen([*prefix, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )
        log.close()
        deadline = time.monotonic() + 10
        while True:
            tried = subprocess.run(
                [*prefix, "ssh", "-F", self.config, "-o", "BatchMode=yes", host, "true"],
                capture_output=True,
                encoding="utf-8",
            )
            if tried.returncode == 0:
                return
            if time.monotonic() > deadline:
                self.close()
                pytest.skip(f"sshd does not let this user in: {tried.stderr.strip()}")
            time.sleep(0.1)

    def flags(self, launcher: str) -> list[str]:
        """The flags of the deepspeed command that make ``launcher`` go by our ssh."""
        given = ["--launcher", launcher]
        return [*given, "--launcher_args", f"-F {self.config}"] if launcher == "ssh" else given

    def environment(self) -> dict[str, str]:
        return {"PDSH_SSH_ARGS_APPEND": f"-F {self.config}", "PDSH_RCMD_TYPE": "ssh"}

    def pids(self) -> list[int]:
        return [daemon.pid for daemon in self._daemons]

    def close(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        self._daemons = []


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Sshd]:
    """One daemon on every loopback address."""
    sshd = Sshd(folder)
    try:
        sshd.serve()
        yield sshd
    finally:
        sshd.close()


@contextlib.contextmanager
def namespaces(sshd: Sshd) -> Iterator[tuple[list[str], list[str], str]]:
    """Two network namespaces joined by a cable, a daemon in each.

    Gives the addresses, the command that enters the first, and the name of its end of the cable (same in both).
    """
    ip = program("ip")
    names, cable = [f"ds{os.getpid()}{side}" for side in "ab"], "dscable"
    hosts = ["10.255.77.1", "10.255.77.2"]
    if os.geteuid() != 0 or subprocess.run([ip, "netns", "add", names[0]]).returncode != 0:
        pytest.skip("network namespaces are for root")

    def do(*words: str) -> None:
        subprocess.run([ip, *words], check=True)

    try:
        do("netns", "add", names[1])
        ends = [("name", cable, "netns", name) for name in names]
        do("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, host in zip(names, hosts, strict=True):
            do("-n", name, "addr", "add", f"{host}/24", "dev", cable)
            do("-n", name, "link", "set", "lo", "up")
            do("-n", name, "link", "set", cable, "up")
        for name, host in zip(names, hosts, strict=True):
            sshd.serve((ip, "netns", "exec", name), host)
        yield hosts, [ip, "netns", "exec", names[0]], cable
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], check=False)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """A Slurm cluster of two nodes on this machine; gives its configuration file."""
    programs = [program(name) for name in ("slurmctld", "slurmd", "srun", "sinfo")]
    if os.geteuid() != 0:
        pytest.skip("slurmd is for root")
    name, ports = socket.gethostname(), [free_port() for _ in range(3)]
    config = folder / "slurm.conf"
    nodes = "".join(
        f"NodeName=node{i} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN\n"
        for i, port in enumerate(ports[1:], start=1)
    )
    config.write_text(
        f"ClusterName=loop\nSlurmctldHost={name}(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmUser=root\n"
        "AuthType=auth/none\nCredType=cred/none\nMpiDefault=none\nProctrackType=proctrack/linuxproc\n"
        "TaskPlugin=task/none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\n"
        f"StateSaveLocation={folder}\nSlurmdSpoolDir={folder}/%n\n"
        f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/%n.pid\nReturnToService=2\n"
        f"SlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/%n.log\n{nodes}"
        "PartitionName=all Nodes=node1,node2 Default=YES State=UP\n",
        encoding="utf-8",
    )
    env = {**os.environ, "SLURM_CONF": str(config)}
    daemons = []
    try:
        for words in ([programs[0]], [programs[1], "-N", "node1"], [programs[1], "-N", "node2"]):
            with (folder / "out").open("ab") as out:
                daemons.append(
                    subprocess.Popen(
                        [*words, "-D"], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                    )
                )
        deadline = time.monotonic() + 20
        while True:
            told = subprocess.run(
                [programs[3], "-h", "-o", "%D %t"], env=env, capture_output=True, encoding="utf-8"
            ).stdout
            if told.split() == ["2", "idle"]:
                break
            if time.monotonic() > deadline:
                said = (folder / "out").read_text(encoding="utf-8", errors="replace")
                pytest.skip(f"Slurm does not come up here: {told} {said[-500:]}")
            time.sleep(0.2)
        yield config
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
