# SPDX-License-Identifier: Apache-2.0
"""Who takes part: the hostfile's grammar, include and exclude filters, and the world info made of them.

A *pool* maps host names to their number of slots, a *selection* maps them to slot numbers; both keep
the hostfile's order.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

_ENTRY = re.compile(r"^(\S+)\s+slots=(\d+)")
_FILTER_FORM = "HOST[:SLOT,SLOT...][@HOST...]"


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """Read a hostfile; one that is not there means "this machine only" and returns None.

    Raises:
        ValueError: the file has no host, a malformed line or a host twice.
    """
    path = Path(hostfile_path)
    if not path.is_file():
        logger.warning(
            "Unable to find hostfile, will proceed with training with local resources only."
        )
        return None
    return _parse_hostfile(path.read_text(encoding="utf-8-sig").splitlines())


def _parse_hostfile(hostfile_lines: Iterable[str]) -> dict[str, int]:
    pool: dict[str, int] = {}
    for number, line in enumerate(hostfile_lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        entry = _ENTRY.match(text)
        if entry is None:
            raise ValueError(
                explain(
                    "Hostfile contains a bad entry",
                    got=f"line {number}: {text}",
                    expected="HOST slots=NUMBER",
                    fix="Correct the line, or start it with # to leave it out.",
                )
            )
        host, slots = entry[1], int(entry[2])
        if host in pool:
            raise ValueError(
                explain(
                    f"Hostfile contains multiple entries for {host}",
                    got=f"line {number}: {text}",
                    fix="Give each host one line with all its slots.",
                )
            )
        pool[host] = slots
    if not pool:
        raise ValueError(
            explain("Hostfile is empty or not formatted correctly", expected="HOST slots=NUMBER")
        )
    return pool


def _slot_number(text: str, host: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            explain(f"bad slot of host {host!r}", got=repr(text), expected=_FILTER_FORM)
        ) from None


def _parse_filter(text: str, hosts: Mapping[str, list[int]]) -> dict[str, set[int]]:
    """Return what a filter names: host → slots, a host without slots standing for all of its own."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        if host not in hosts:
            raise ValueError(
                explain(
                    f"Hostname {host!r} not found in hostfile",
                    got=repr(text),
                    expected=f"{_FILTER_FORM} with hosts among {', '.join(hosts)}",
                )
            )
        chosen = [_slot_number(s, host) for s in slots.split(",")] if colon else hosts[host]
        for slot in chosen:
            if slot not in hosts[host]:
                raise ValueError(
                    explain(
                        f"No slot '{slot}' specified on host {host!r}",
                        got=repr(text),
                        expected=f"slots among {', '.join(map(str, hosts[host])) or 'none'}",
                    )
                )
        named.setdefault(host, set()).update(chosen)
    return named


def parse_resource_filter(
    host_info: Mapping[str, list[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """Select slots by an include or an exclude filter (``worker-0@worker-1:0,2``).

    Args:
        host_info: all slots of each host.
        include_str: take only these; "" takes all.
        exclude_str: take all but these. A host left without slots is dropped.

    Returns:
        Slots by host, hosts in the order of ``host_info``, slots ascending.

    Raises:
        ValueError: both filters are given, or one is malformed or names what is not there.
    """
    if include_str and exclude_str:
        raise ValueError(
            explain(
                "include_str and exclude_str are mutually exclusive.",
                got=f"--include {include_str} and --exclude {exclude_str}",
                fix="Give one of them.",
            )
        )
    if not include_str and not exclude_str:
        return dict(host_info)
    named = _parse_filter(include_str or exclude_str, host_info)
    selected = {}
    for host, slots in host_info.items():
        chosen = named.get(host, set())
        kept = [slot for slot in sorted(slots) if (slot in chosen) == bool(include_str)]
        if kept:
            selected[host] = kept
    return selected


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str, exclusion: str
) -> dict[str, list[int]]:
    """Like `parse_resource_filter`, from the number of slots of each host."""
    everything = {host: list(range(slots)) for host, slots in resource_pool.items()}
    return parse_resource_filter(everything, include_str=inclusion, exclude_str=exclusion)


def encode_world_info(world_info: Mapping[str, list[int]]) -> str:
    """Return the selection as URL-safe base64 of JSON, one word of a command line."""
    return base64.urlsafe_b64encode(json.dumps(world_info).encode("utf-8")).decode("ascii")


def decode_world_info(encoded: str) -> dict[str, list[int]]:
    """Return the selection that `encode_world_info` wrote.

    Raises:
        ValueError: the text is nothing of the kind, or no host has a slot.
    """
    try:
        world = json.loads(base64.urlsafe_b64decode(encoded.encode("ascii")))
        world = {str(host): [int(slot) for slot in slots] for host, slots in world.items()}
    except (ValueError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(
            explain(
                "world info cannot be read",
                got=repr(encoded),
                expected='base64 of JSON such as {"localhost": [0, 1]}',
                fix="Start ranks with the deepspeed command, which writes it.",
            )
        ) from error
    if not any(world.values()):
        raise ValueError(explain("world info names no slot", got=repr(world)))
    return world
