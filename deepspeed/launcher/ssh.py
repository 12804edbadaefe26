# SPDX-License-Identifier: Apache-2.0
"""ssh as the launcher uses it: the command line, what its complaints mean, and launch.py on a node.

Nothing of the user's reaches a remote shell. The command that ssh carries is fixed (our Python, and a loader
in letters that no shell changes); everything else, the environment, the folder, the script and its
arguments, travels as JSON on standard input.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deepspeed.utils.errors import explain

from .commands import launch_words, split_words
from .lifeline import SILENCE_S
from .processes import WINDOWS

CONNECT_S = 10
# what makes a connection notice that there is none, or that it has ended
KEEP_ALIVE = (
    *("-o", f"ConnectTimeout={CONNECT_S}"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"),
)
_HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")

_LOADER = b"""
import importlib.util, json, os, runpy, sys
told = json.loads(sys.stdin.buffer.readline())
os.environ.update(told["env"])
try:
    os.chdir(told["folder"])
except OSError as error:
    sys.exit("deepspeed: error: this node lacks the launcher's current folder: %s" % error)
sys.path[:0] = told["path"]
sys.argv = ["deepspeed.launcher.launch", *told["words"]]
if importlib.util.find_spec("deepspeed") is None:
    sys.exit("deepspeed: error: this node's %s has no deepspeed; install it there" % sys.executable)
runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
"""

_MENDS = (
    (
        ("Permission denied", "Too many authentication failures"),
        "Put your public key there (ssh-copy-id), and see that ssh offers it without a password.",
    ),
    (
        ("Host key verification failed", "HOST IDENTIFICATION HAS CHANGED"),
        "Connect once by hand to accept its host key, or correct it in known_hosts.",
    ),
    (
        ("Could not resolve", "Name or service not known", "nodename nor servname", "No such host"),
        "Correct the name in the hostfile, or teach DNS or /etc/hosts the name.",
    ),
    (("Connection refused",), "Start sshd there, or give its port with --ssh_port."),
    (
        ("timed out", "No route to host", "unreachable", "not responding"),
        "See that the machine runs, and that the network and firewalls let ssh through.",
    ),
)


def check_hosts(hosts: Iterable[str]) -> None:
    """Check that no host's name could be read as anything else by a program that gets it.

    Raises:
        ValueError: one could be.
    """
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ValueError(
                explain(
                    "the hostfile has a host whose name cannot be one",
                    got=repr(host),
                    expected="[USER@]NAME of letters, digits, dots, hyphens and underscores",
                    fix="Correct the name in the hostfile.",
                )
            )


def backend_exists() -> bool:
    """Say whether an ssh client is installed."""
    return shutil.which("ssh") is not None


def ssh_words(port: int | None, extra: Sequence[str] = ()) -> list[str]:
    """Return ssh with the options of a connection that asks nothing and notices its own end.

    Args:
        port: the port; None leaves it to ssh's configuration.
        extra: the user's own options, which win.
    """
    words = ["ssh", "-T", *extra, "-o", "BatchMode=yes", *KEEP_ALIVE]
    return [*words, *(["-p", str(port)] if port is not None else [])]


def mend(complaint: str) -> str:
    """Return what to do about ssh's own words; a hint for any when none is known."""
    for signs, advice in _MENDS:
        if any(sign in complaint for sign in signs):
            return advice
    return "Try the same by hand: ssh -o BatchMode=yes HOST true."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def lost(host: str, complaint: str) -> str:
    """Return the end of a sentence about a client that ended with ssh's own status, 255."""
    if not any(sign in complaint for signs, _ in _MENDS for sign in signs):
        return ": ssh lost the connection, or the script's own status is 255"
    return f": {_last_line(complaint)}. {mend(complaint)}"


def _try(words: Sequence[str], host: str, command: Sequence[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            [*words, host, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=3 * CONNECT_S,
        )
    except subprocess.TimeoutExpired:
        return 255, "", f"timed out after {3 * CONNECT_S} s"
    return done.returncode, done.stdout, done.stderr


def probe(hosts: Sequence[str], words: Sequence[str]) -> None:
    """Check that ssh runs a command on each host without asking for anything.

    Args:
        hosts: the hosts, tried 32 at a time.
        words: ssh and its options.

    Raises:
        RuntimeError: it does not; the hosts and the mend are named.
    """
    with concurrent.futures.ThreadPoolExecutor(min(32, len(hosts))) as pool:
        tried = list(pool.map(lambda host: _try(words, host, ["hostname"]), hosts))
    failed = {
        host: complaint for host, (code, _, complaint) in zip(hosts, tried, strict=True) if code
    }
    if failed:
        first = next(iter(failed.values()))
        raise RuntimeError(
            explain(
                f"ssh cannot run commands on {', '.join(failed)}",
                got="; ".join(f"{host}: {_last_line(said)}" for host, said in failed.items()),
                expected="passwordless ssh to every node",
                fix=mend(first),
            )
        )


def master_address(host: str, words: Sequence[str]) -> str:
    """Return an address of ``host`` that the other nodes can reach: its own first one, else its name."""
    code, told, _ = _try(words, host, ["hostname", "-I"])
    for word in told.split()[:1] if code == 0 else []:
        try:
            return str(ipaddress.ip_address(word))
        except ValueError:
            break
    code, told, _ = _try([words[0], "-G", *words[1:]], host, [])
    names = [line.split()[1] for line in told.splitlines() if line.startswith("hostname ")]
    return names[0] if names else host.rpartition("@")[2]


def remote_command(venv_script: str | None = None) -> str:
    """Return the fixed command that loads launch.py on a node, as one line for its shell."""
    loader = base64.b64encode(_LOADER).decode("ascii")
    python = sys.executable
    if WINDOWS:
        python = f'"{python}"' if " " in python else python
    else:
        python = shlex.quote(python)
    line = f"{python} -u -c \"import base64;exec(base64.b64decode('{loader}'))\""
    if venv_script:
        return f". {shlex.quote(str(Path(venv_script).absolute()))} && {line}"
    return line


def node_commands(
    args: argparse.Namespace,
    world_info: str,
    hosts: Sequence[str],
    exports: Mapping[str, str],
) -> list[tuple[str, list[str], bytes]]:
    """Return for each host its name, the ssh command, and what the loader reads first.

    Args:
        args: the ``deepspeed`` command line.
        world_info: hosts and slots, as `encode_world_info` writes them.
        hosts: the hosts, in the order of their node ranks.
        exports: environment of the ranks.
    """
    ssh = ssh_words(args.ssh_port, split_words(args.launcher_args))
    line = remote_command(args.venv_script)
    told = {
        "env": dict(exports),
        "folder": os.getcwd(),
        "path": [part for part in exports.get("PYTHONPATH", "").split(os.pathsep) if part],
    }
    commands = []
    for rank, host in enumerate(hosts):
        flags = launch_words(args, world_info, node_rank=str(rank), lifeline=SILENCE_S)
        words = [*flags, args.user_script, *args.user_args]
        hello = json.dumps({**told, "words": words}).encode("ascii") + b"\n"
        commands.append((host, [*ssh, "--", host, line], hello))
    return commands
