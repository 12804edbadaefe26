# SPDX-License-Identifier: Apache-2.0
"""Files that several ranks write together: which rank writes what of a file that each of them could write alone.

[Note: A file of several writers]
Ranks that hold the same weights give `divide` files of the same name. The first of them leads: the file is, byte for
byte, the one that it would write alone. The others take over its layout, each sums its part of the tensors, and the
leader sums all parts. A part whose sums agree is written by its rank; one that differs (statistics of a batch norm, a
generator's state) by the leader, as it always was. So no file ever mixes states, and readers see no difference. Parts
begin on pages, so that no two ranks write one page. The leader makes the file before the others write into it, and
alone writes headers, small records and the directory. All this is agreed upon before a byte is written: a save beside
training needs no communication later.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from ..utils.logging import logger
from ..utils.numa import get_numa_cores
from .archive import Archive, Record, byte_view
from .crew import Crew
from .digest import combine_all, crc32, crc32_of_address, in_parallel

T = TypeVar("T")

SOCKET, MACHINE = "SOCKET", "MACHINE"
_PAGE = 4096
_PIECE = 16 << 20


class _Offer(NamedTuple):
    """What a rank says of a file that it could write."""

    table: int
    """Checksum of the names and sizes of its records but the pickle."""
    pickled: int
    """Bytes of its pickle, which decide where the other records begin."""
    size: int


class _Told(NamedTuple):
    """What a rank says of itself."""

    leads: bool
    host: str
    sockets: int
    offers: dict[str, _Offer]


class _Part(NamedTuple):
    """Bytes `begin` to `end` of a large record."""

    record: Record
    begin: int
    end: int

    def bytes_of_it(self) -> torch.Tensor:
        return byte_view(self.record.source)[self.begin : self.end]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Team:
    """The ranks that have one file, and those of them that write it; the first of both leads."""

    name: str
    holders: list[int]
    writers: list[int]
    pickled: int


def divide(crew: Crew, archives: dict[str, Archive], among: str, least: int) -> bool:
    """Collectively divide the files that several ranks have laid out; see [Note: A file of several writers].

    Args:
        crew: the ranks of the save.
        archives: this rank's files by name; each is cut down to what this rank writes of it, or taken out.
        among: REPLICA (every rank that has a file writes), SOCKET or MACHINE (one of each does).
        least: files of fewer bytes are written by their first rank alone.

    Returns:
        Whether a file of any rank has several writers.
    """
    told = crew.together(lambda: _told(crew, {n: _offer(made) for n, made in archives.items()}))
    teams = _teams(told, among, least)
    mine = {team.name: team for team in teams if crew.rank in team.holders}
    for name in set(archives):
        if crew.rank not in mine[name].writers:
            del archives[name]
    if all(len(team.writers) == 1 for team in teams):
        return False
    mine = {name: mine[name] for name in archives if len(mine[name].writers) > 1}
    for name, team in mine.items():
        archives[name].follow(team.pickled)
    parts = {name: _cut(archives[name], len(team.writers)) for name, team in mine.items()}
    sums = crew.together(
        lambda: {name: _sums(parts[name], mine[name].writers.index(crew.rank)) for name in mine}
    )
    for name, team in mine.items():
        theirs = [sums[rank][name] for rank in team.writers]
        _keep(name, archives[name], parts[name], theirs, team.writers.index(crew.rank))
    return True


def of_first_ranks(crew: Crew, files: Mapping[str, T]) -> dict[str, T]:
    """Collectively: those of this rank's files that no earlier rank of the same folder has."""
    told = crew.together(lambda: _told(crew, dict.fromkeys(files, _Offer(0, 0, 0))))
    first = {name for (name, _), ranks in _holders(told).items() if ranks[0] == crew.rank}
    return {name: content for name, content in files.items() if name in first}


def _told(crew: Crew, offers: dict[str, _Offer]) -> _Told:
    return _Told(crew.leads, socket.gethostname(), len(get_numa_cores()), offers)


def _offer(archive: Archive) -> _Offer:
    pickled, *rest = archive.records
    table = crc32(repr([(record.name, record.size) for record in rest]).encode())
    return _Offer(table, pickled.size, archive.size)


def _holders(told: Sequence[_Told]) -> dict[tuple[str, str], list[int]]:
    """The ranks that have a file of a name; where each machine has a folder of its own, those of each machine."""
    everywhere = sum(one.leads for one in told) > 1
    found: dict[tuple[str, str], list[int]] = {}
    for rank, one in enumerate(told):
        for name in one.offers:
            found.setdefault((name, one.host if everywhere else ""), []).append(rank)
    return found


def _teams(told: Sequence[_Told], among: str, least: int) -> list[_Team]:
    """The same list on every rank."""
    teams = []
    for (name, _), ranks in sorted(_holders(told).items()):
        offer = told[ranks[0]].offers[name]
        equal = [rank for rank in ranks if told[rank].offers[name].table == offer.table]
        writers = _chosen(told, equal, among) if offer.size >= least else ranks[:1]
        teams.append(_Team(name, ranks, writers, offer.pickled))
    return teams


def _chosen(told: Sequence[_Told], ranks: Sequence[int], among: str) -> list[int]:
    """The first rank of each machine or socket, or all. A machine's ranks lie on its sockets in their order."""
    chosen = []
    for host in dict.fromkeys(told[rank].host for rank in ranks):
        here = [rank for rank in ranks if told[rank].host == host]
        groups = {MACHINE: 1, SOCKET: told[here[0]].sockets}.get(among, len(here))
        groups = min(groups, len(here))
        chosen += [here[-(-len(here) * i // groups)] for i in range(groups)]
    return sorted(chosen)


def _cut(archive: Archive, count: int) -> list[list[_Part]]:
    """The large records in `count` parts of about the same number of bytes, cut at pages."""
    large = [record for record in archive.pieces if not isinstance(record.source, bytes)]
    total = sum(record.size // _PAGE for record in large)
    share = max(1, -(-total // count))
    found: list[list[_Part]] = [[] for _ in range(count)]
    at = 0  # pages so far
    for record in large:
        begin, whole = 0, record.size // _PAGE
        while begin < whole:
            which = at // share
            end = min(whole, begin + (which + 1) * share - at)
            found[which].append(_Part(record, begin * _PAGE, end * _PAGE))
            at += end - begin
            begin = end
        # the rest of a page is the leader's: it writes the next record's header into the same one
        if record.size % _PAGE:
            found[0].append(_Part(record, whole * _PAGE, record.size))
    return found


def _sums(parts: Sequence[Sequence[_Part]], which: int) -> list[list[int]]:
    """Checksums of this rank's own parts; the leader's are all."""
    return [
        [_sum(part) for part in of_rank] if which in (0, i) else []
        for i, of_rank in enumerate(parts)
    ]


def _sum(part: _Part) -> int:
    pieces = part.bytes_of_it().split(_PIECE)

    def one(i: int) -> tuple[int, int]:
        piece = pieces[i].cpu()
        return crc32_of_address(piece.data_ptr(), piece.numel()), piece.numel()

    return combine_all(in_parallel(one, range(len(pieces)), part.end - part.begin))


def _keep(
    name: str,
    archive: Archive,
    parts: Sequence[Sequence[_Part]],
    told: Sequence[Sequence[Sequence[int]]],
    which: int,
) -> None:
    """Cut an archive down to what writer number `which` writes of it."""
    by_record: dict[int, list[tuple[int, int, int]]] = {}
    own = [r for r in archive.pieces if isinstance(r.source, bytes) and which == 0]
    differing = 0
    for writer, of_writer in enumerate(parts):
        for part, right, theirs in zip(
            of_writer, told[0][writer], told[writer][writer], strict=True
        ):
            length = part.end - part.begin
            by_record.setdefault(id(part.record), []).append((part.begin, right, length))
            agree = right == theirs
            differing += 0 if agree else length
            if which == (writer if agree else 0):
                begin = part.record.begin + part.begin
                own.append(
                    Record(part.record.name, part.bytes_of_it(), length, begin=begin, crc=right)
                )
    for record in archive.pieces:
        if id(record) in by_record:
            ordered = sorted(by_record[id(record)])
            record.crc = combine_all((value, length) for _, value, length in ordered)
    archive.keep(own, leads=which == 0)
    if differing and which == 0:
        logger.info(f"{name}: {differing:,} bytes are not the same on all ranks, one writes them")
