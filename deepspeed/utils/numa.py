# SPDX-License-Identifier: Apache-2.0
"""Which cores a rank gets: the machine's NUMA nodes, core lists such as ``0-7,12``, and their even split."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from pathlib import Path

import psutil

from . import env
from .errors import explain

_NODES = Path("/sys/devices/system/node")


def parse_range(rng: str) -> list[int]:
    """Return the numbers of one range, ``"3"`` or ``"3-5"``.

    Raises:
        ValueError: it is neither form, or its end lies before its start.
    """
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", rng)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if last < first:
        raise ValueError(
            explain("bad range of cores", got=repr(rng), expected="a number or FIRST-LAST")
        )
    return list(range(first, last + 1))


def parse_range_list(range_str: str) -> list[int]:
    """Return the numbers of comma-separated ranges, ``"0-3,8"`` is ``[0, 1, 2, 3, 8]``.

    Raises:
        ValueError: a range is malformed, or the ranges overlap or do not ascend.
    """
    numbers: list[int] = []
    for part in range_str.split(","):
        more = parse_range(part)
        if numbers and more[0] <= numbers[-1]:
            raise ValueError(
                explain(
                    "bad list of cores",
                    got=repr(range_str),
                    expected="ascending ranges that do not overlap, such as 0-7,12-19",
                )
            )
        numbers += more
    return numbers


def format_range_list(numbers: list[int]) -> str:
    """Return ascending numbers in the form that `parse_range_list` reads, ranges folded."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _windows_nodes() -> list[list[int]]:
    highest = ctypes.c_ulong(0)
    kernel32 = ctypes.windll.kernel32
    if not kernel32.GetNumaHighestNodeNumber(ctypes.byref(highest)):
        return []
    nodes = []
    for node in range(highest.value + 1):
        mask = ctypes.c_ulonglong(0)
        if kernel32.GetNumaNodeProcessorMask(ctypes.c_ubyte(node), ctypes.byref(mask)):
            nodes.append([bit for bit in range(64) if mask.value >> bit & 1])
    return nodes


def get_numa_cores() -> list[list[int]]:
    """Return the cores of each NUMA node that has any; one node of all cores where none is told."""
    if sys.platform == "win32":
        nodes = _windows_nodes()
    else:
        nodes = []
        folders = [f for f in _NODES.glob("node*") if re.fullmatch(r"node\d+", f.name)]
        for folder in sorted(folders, key=lambda f: int(f.name[4:])):
            try:
                cpulist = (folder / "cpulist").read_text(encoding="utf-8").strip()
            except OSError:
                continue
            nodes.append(parse_range_list(cpulist) if cpulist else [])
    return [node for node in nodes if node] or [list(range(psutil.cpu_count() or 1))]


def check_for_numactl_pkg() -> bool:
    """Say whether the ``numactl`` program is on the PATH."""
    return shutil.which("numactl") is not None


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has no affinity at all
        return sorted(process.cpu_affinity())
    return list(range(psutil.cpu_count() or 1))


def cores_of_rank(bind_core_list: str | None, num_local_procs: int, local_rank: int) -> list[int]:
    """Return the cores for one of ``num_local_procs`` ranks: an even, contiguous share.

    Args:
        bind_core_list: cores to share out, such as ``"0-7,12"``; None takes those this process may use.
        num_local_procs: ranks on this machine.
        local_rank: which of them.

    Raises:
        ValueError: ``bind_core_list`` is malformed.
        AssertionError: there are fewer cores than ranks.
    """
    cores = parse_range_list(bind_core_list) if bind_core_list else available_cores()
    share = len(cores) // num_local_procs
    if share < 1:
        raise AssertionError(
            explain(
                "At least one core needs to be assigned to each rank",
                got=f"{len(cores)} cores for {num_local_procs} ranks",
                fix="Name more cores in --bind_core_list or start fewer ranks.",
            )
        )
    return cores[share * local_rank : share * (local_rank + 1)]


def get_numactl_cmd(
    bind_core_list: str | None, num_local_procs: int, local_rank: int
) -> tuple[int, list[str]]:
    """Return how many cores a rank gets, and the ``numactl`` words that pin it to them.

    With several NUMA nodes the rank's memory is bound to the nodes of its cores as well. Whether
    ``numactl`` is installed is the caller's question (`check_for_numactl_pkg`).

    Raises:
        ValueError: ``bind_core_list`` is malformed, or KMP_AFFINITY pins threads as well.
        AssertionError: there are fewer cores than ranks.
    """
    if (env.KMP_AFFINITY.get() or "none").lower() not in ("none", "disabled"):
        raise ValueError(
            explain(
                "two ways to pin threads are in force",
                got=f"KMP_AFFINITY={env.KMP_AFFINITY.raw()} and core binding",
                fix="Unset KMP_AFFINITY, or do not ask for --bind_cores_to_rank.",
            )
        )
    cores = cores_of_rank(bind_core_list, num_local_procs, local_rank)
    command = ["numactl", "-C", format_range_list(cores)]
    nodes = get_numa_cores()
    if len(nodes) > 1:
        touched = [index for index, node in enumerate(nodes) if not set(node).isdisjoint(cores)]
        if touched:
            command += ["-m", ",".join(map(str, touched))]
    return len(cores), command
