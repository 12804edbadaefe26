# SPDX-License-Identifier: Apache-2.0
"""Words of command lines that several of the launcher's parts write."""

from __future__ import annotations

import argparse
import os
import shlex

from .processes import WINDOWS


def split_words(text: str) -> list[str]:
    """Split a flag's value into words, as a shell would; Windows paths keep their backslashes."""
    if not WINDOWS:
        return shlex.split(text)
    return [word.strip("\"'") for word in shlex.split(text, posix=False)]


def launch_words(
    args: argparse.Namespace,
    world_info: str,
    *,
    node_rank: str | None = None,
    lifeline: float | None = None,
) -> list[str]:
    """Return launch.py's flags for one node.

    Args:
        args: the ``deepspeed`` command line, with the master address filled in.
        world_info: hosts and slots, as `encode_world_info` writes them.
        node_rank: the node's index; None for the only one.
        lifeline: see `deepspeed.launcher.lifeline`; None when standard input is the user's.
    """
    words = [f"--world_info={world_info}"]
    if node_rank is not None:
        words.append(f"--node_rank={node_rank}")
    words += [f"--master_addr={args.master_addr}", f"--master_port={args.master_port}"]
    for flag in ("no_python", "module", "no_local_rank"):
        if getattr(args, flag):
            words.append(f"--{flag}")
    if args.save_pid:
        words.append(f"--save_pid={os.getpid()}")
    words.append(f"--enable_each_rank_log={args.enable_each_rank_log}")
    if args.elastic_training:
        words.append("--enable_elastic_training")
        words.append(f"--max_elastic_nodes={args.max_elastic_nodes}")
        words.append(f"--min_elastic_nodes={args.min_elastic_nodes}")
    if args.bind_cores_to_rank:
        words.append("--bind_cores_to_rank")
    if args.bind_core_list is not None:
        words.append(f"--bind_core_list={args.bind_core_list}")
    if lifeline is not None:
        words.append(f"--lifeline={lifeline:g}")
    if args.quiet:
        words.append("--quiet")
    words.append(f"--log_level={args.log_level}")
    return words
