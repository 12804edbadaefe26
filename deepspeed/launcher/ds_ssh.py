# SPDX-License-Identifier: Apache-2.0
"""``ds_ssh``: one command on every host of a hostfile, through ssh alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deepspeed.utils.errors import explain

from . import ssh
from .arguments import ScriptParser
from .commands import split_words
from .constants import DEFAULT_HOSTFILE
from .fleet import Fleet
from .hostfile import fetch_hostfile, parse_inclusion_exclusion
from .launch import speak_any_script, told_clearly
from .processes import Signals


def build_parser() -> ScriptParser:
    """Make the parser of the command's arguments."""
    parser = ScriptParser(
        "command",
        "rest",
        prog="ds_ssh",
        usage="%(prog)s [flags] command [args...]",
        description="Run a command on every host. Each host's shell reads it, as with ssh itself.",
    )
    add = parser.add_argument
    add("-f", "--hostfile", default=DEFAULT_HOSTFILE, help="lines HOST slots=NUMBER")
    add("-i", "--include", default="", help="only these hosts: HOST[@HOST...]")
    add("-e", "--exclude", default="", help="all but these hosts")
    add("-p", "--ssh_port", type=int, default=None, help="ssh port of the hosts")
    add("--ssh_args", default="", help="more options of ssh")
    return parser


def run(args: Sequence[str] | None = None) -> int:
    """Run the command everywhere; each line of output begins with its host.

    Returns:
        0 when it ended well everywhere, else the status of one where it did not.

    Raises:
        FileNotFoundError: there is no hostfile.
        ValueError: the hostfile, a filter or a host's name is not usable.
        RuntimeError: there is no ssh client.
    """
    options = build_parser().parse_args(args)
    pool = fetch_hostfile(options.hostfile)
    if pool is None:
        raise FileNotFoundError(
            explain(f"there is no hostfile {options.hostfile!r}", fix="Give one with -f.")
        )
    if not ssh.backend_exists():
        raise RuntimeError(explain("there is no ssh", fix="Install an OpenSSH client."))
    hosts = list(parse_inclusion_exclusion(pool, options.include, options.exclude))
    ssh.check_hosts(hosts)
    words = ssh.ssh_words(options.ssh_port, split_words(options.ssh_args))
    line = " ".join([options.command, *options.rest])
    with Signals() as signals:
        fleet = Fleet(signals, tolerated=None, beats=False, mend=ssh.lost)
        for host in hosts:
            fleet.start(host, [*words, "--", host, line])
        return fleet.wait()


def main(args: Sequence[str] | None = None) -> int:
    """The ``ds_ssh`` command."""
    speak_any_script()
    status = 1
    with told_clearly("ds_ssh"):
        status = run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
