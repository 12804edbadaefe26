# SPDX-License-Identifier: Apache-2.0
"""A file in torch's zip format, laid out before a byte of it is written.

`torch.save` pushes bytes through one stream: each tensor is summed, copied into the page cache, and summed again for the
manifest, one after the other. Here the pickle is made first, then the place of every record is known, so that tensors go
to the disk from where they lie, many at a time and past the page cache, while other threads take their checksums.

[Note: Layout]
A zip archive of stored records, as torch's reader wants it: `archive/data.pkl`, `archive/byteorder`, the storages
`archive/data/<key>`, `archive/version`. The data of a record begins at a multiple of 64 bytes, that of a large one at a
multiple of a page, reached by an extra field of padding in its header. What lies between two large records (headers,
small records, padding) is put together in memory, in pieces of bounded size, once the sums it names are known.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .digest import combine_all, crc32

_ROOT = "archive"
_VERSION = b"3\n"
_SMALL_UNIT, _LARGE_UNIT = 64, 4096
LARGE = 1 << 16
"""Records of at least so many bytes are written from where they lie."""
_GAP = 8 << 20
"""At most about so many bytes are put together in memory at a time."""
_LIMIT32 = 0xFFFFFFFF
_LOCAL, _CENTRAL, _END64, _LOCATOR64, _END = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x06\x06",
    b"PK\x06\x07",
    b"PK\x05\x06",
)
_UTF8 = 0x800
_DATE = 0x21  # the first day of 1980: equal states give equal files


@dataclass
class Record:
    """One record: its bytes (in memory, in a storage, or copied out of one), and where it goes in the file."""

    name: bytes
    source: bytes | torch.UntypedStorage | torch.Tensor
    size: int
    header: int = 0
    """Offset of its header."""
    begin: int = 0
    """Offset of its data."""
    crc: int | None = None

    @property
    def is_large(self) -> bool:
        """Whether it is written from where it lies."""
        return self.size >= LARGE


class _Pickler(pickle.Pickler):
    """Writes objects as torch.save does, and collects the storages that they name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[str, torch.UntypedStorage] = {}
        self._keys: dict[tuple[str, int], str] = {}
        self._dtypes: dict[int, torch.dtype] = {}

    def reducer_override(self, item: Any) -> Any:
        """Parameters go without attributes of their own, which may be anything and which readers drop."""
        if type(item) is not torch.nn.Parameter or not vars(item):
            return NotImplemented
        hooks: OrderedDict[int, Any] = OrderedDict()
        return torch._utils._rebuild_parameter, (item.data, item.requires_grad, hooks)

    def persistent_id(self, item: Any) -> Any:
        """Name a storage; None for everything else."""
        if isinstance(item, torch.storage.TypedStorage):
            storage, dtype = item._untyped_storage, item.dtype
            kind: Any = getattr(torch, item._pickle_storage_type())
            count = item._size()
        elif isinstance(item, torch.UntypedStorage):
            storage, dtype, kind, count = item, torch.uint8, torch.UntypedStorage, item.nbytes()
        else:
            return None
        address = storage.data_ptr() if storage.device.type != "meta" else 0
        if address and self._dtypes.setdefault(address, dtype) != dtype:
            raise RuntimeError(
                "Cannot save multiple tensors or storages that view the same data as different types"
            )
        place = torch.serialization.location_tag(storage)
        key = self._keys.setdefault((place, storage._cdata), str(len(self._keys)))
        self.storages[key] = storage
        return ("storage", kind, key, place, count)


@dataclass
class Archive:
    """The records of one file, each in its place; see [Note: Layout].

    Attributes:
        records: in the order of the file.
        size: bytes of the whole file.
        leads: whether this process writes what is not a large record, if several write the file.
    """

    records: list[Record] = field(default_factory=list)
    size: int = 0
    leads: bool = True
    _directory: int = 0
    _own: list[Record] | None = None

    @classmethod
    def of(cls, content: Any) -> Archive:
        """Pickle an object and lay out its file; storages are neither copied nor read yet.

        Raises:
            pickle.PicklingError: and whatever else an object raises that cannot be pickled.
        """
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(content)
        made = cls()
        made._add("data.pkl", stream.getvalue())
        made._add("byteorder", sys.byteorder.encode())
        for key, storage in pickler.storages.items():
            made._add(f"data/{key}", storage)
        made._add("version", _VERSION)
        made._lay_out()
        return made

    def _add(self, name: str, source: bytes | torch.UntypedStorage) -> None:
        size = len(source) if isinstance(source, bytes) else source.nbytes()
        self.records.append(Record(f"{_ROOT}/{name}".encode(), source, size))

    def _lay_out(self) -> None:
        at = 0
        for record in self.records:
            record.header = at
            unit = _LARGE_UNIT if record.is_large else _SMALL_UNIT
            bare = at + 30 + len(record.name) + len(_wide_sizes(record)) + 4
            record.begin = -(-bare // unit) * unit
            at = record.begin + record.size
        self._directory = at
        self.size = at + len(self._tail(known=False))

    @property
    def pieces(self) -> list[Record]:
        """What this process writes from where it lies: large records, or its parts of them."""
        return [r for r in self.records if r.is_large] if self._own is None else self._own

    @property
    def is_divided(self) -> bool:
        """Whether several processes write the file."""
        return self._own is not None

    @property
    def own_size(self) -> int:
        """Bytes that this process writes."""
        if self._own is None:
            return self.size
        others = self.size - sum(r.size for r in self.records if r.is_large)
        return sum(r.size for r in self._own) + (others if self.leads else 0)

    @property
    def storages(self) -> list[Record]:
        """What this process writes of storages."""
        small = [r for r in self.records if not r.is_large] if self.leads else []
        return [r for r in (*small, *self.pieces) if not isinstance(r.source, bytes)]

    def follow(self, pickled: int) -> None:
        """Lay the file out as one whose pickle has `pickled` bytes: somebody else writes that."""
        self.records[0].size = pickled
        self._lay_out()

    def keep(self, own: list[Record], leads: bool) -> None:
        """Write only these parts of large records, whose sums are known, and the rest if this process leads."""
        self._own, self.leads = own, leads

    def gaps(self) -> Iterator[tuple[int, bytearray]]:
        """What is not a large record, in the file's order: offsets and bytes; needs the sums of large records."""
        start, gap = 0, bytearray()
        for record in self.records:
            _extend(gap, start, record.header)
            if not record.is_large:
                data = record_bytes(record)
                record.crc = crc32(data)
                gap += _local_header(record)
                gap += data
            else:
                gap += _local_header(record)
            if record.is_large or len(gap) >= _GAP:
                yield start, gap
                start, gap = record.begin + record.size, bytearray()
        gap += self._tail(known=True)
        yield start, gap

    def crc(self, gaps: Sequence[tuple[int, int, int]]) -> int:
        """The sum of the whole file, from the sums of its large records and of gaps: (offset, sum, length)."""
        parts = [*gaps, *((r.begin, r.crc or 0, r.size) for r in self.records if r.is_large)]
        return combine_all((value, length) for _, value, length in sorted(parts))

    def _tail(self, known: bool) -> bytes:
        """The directory at the end of the file; with sums of zero while they are not known."""
        directory = b"".join(_central_header(record, known) for record in self.records)
        count, at = len(self.records), self._directory
        end = at + len(directory)
        return b"".join(
            (
                directory,
                _END64,
                struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), at),
                _LOCATOR64,
                struct.pack("<IQI", 0, end, 1),
                _END,
                struct.pack(
                    "<HHHHIIH",
                    *(0, 0, min(count, 0xFFFF), min(count, 0xFFFF)),
                    *(min(len(directory), _LIMIT32), min(at, _LIMIT32), 0),
                ),
            )
        )


def byte_view(storage: torch.UntypedStorage | torch.Tensor) -> torch.Tensor:
    """A storage as a flat tensor of bytes that shares its memory; such a tensor as it is."""
    if isinstance(storage, torch.Tensor):
        return storage
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def record_bytes(record: Record) -> Any:
    """A record's bytes in host memory, as a buffer."""
    if isinstance(record.source, bytes):
        return record.source
    if record.size == 0:
        return b""
    return byte_view(record.source).cpu().numpy().data


def _extend(gap: bytearray, start: int, to: int) -> None:
    if start + len(gap) != to:
        raise AssertionError(f"a header belongs at {to}, and {start + len(gap)} was reached")


def _wide_sizes(record: Record) -> bytes:
    """The extra field of sizes that do not fit 32 bits."""
    if record.size < _LIMIT32:
        return b""
    return struct.pack("<HHQQ", 1, 16, record.size, record.size)


def _local_header(record: Record) -> bytes:
    wide = _wide_sizes(record)
    padding = record.begin - record.header - 30 - len(record.name) - len(wide) - 4
    extra = wide + b"FB" + struct.pack("<H", padding) + bytes(padding)
    size = min(record.size, _LIMIT32) if not wide else _LIMIT32
    numbers = struct.pack(
        "<HHHHHIIIHH",
        *(45 if wide else 20, _UTF8, 0, 0, _DATE, record.crc or 0),
        *(size, size, len(record.name), len(extra)),
    )
    return _LOCAL + numbers + record.name + extra


def _central_header(record: Record, known: bool) -> bytes:
    large = record.size >= _LIMIT32
    wide = struct.pack("<QQ", record.size, record.size) if large else b""
    size = _LIMIT32 if large else record.size
    place = record.header
    if place >= _LIMIT32:
        wide += struct.pack("<Q", place)
        place = _LIMIT32
    extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
    numbers = struct.pack(
        "<HHHHHHIIIHHHHHII",
        *(45, 45 if wide else 20, _UTF8, 0, 0, _DATE, (record.crc or 0) if known else 0),
        *(size, size, len(record.name), len(extra), 0, 0, 0, 0, place),
    )
    return _CENTRAL + numbers + record.name + extra
