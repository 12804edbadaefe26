# SPDX-License-Identifier: Apache-2.0
"""What a shared library asks of the system that loads it, read from the file: ELF and PE, with no tool installed.

The gate of the wheels: only libraries that every system has, and no newer C library than promised.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

# The parts of the C library, which versions before 2.34 keep in files of their own, and the loader.
LINUX = re.compile(r"(libc|libm|libpthread|libdl|librt)\.so\.\d|ld-linux.*\.so\.\d")
# What comes with Windows 10 itself. The run time of a compiler (vcruntime140, libstdc++-6, libgcc_s) does not.
WINDOWS = re.compile(r"(kernel32|ntdll|advapi32|msvcrt|ucrtbase|api-ms-win-[a-z0-9-]+)\.dll")

_NEEDED, _STRINGS, _VERSIONS, _VERSION_COUNT = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF


class BinaryError(ValueError):
    """A library asks for something that not every system has, or is no library; the message says what."""


class Needs(NamedTuple):
    """What a library asks for.

    Attributes:
        libraries: file names of the libraries that are loaded with it.
        glibc: newest version of the C library whose symbols it uses; None for other systems.
    """

    libraries: tuple[str, ...]
    glibc: tuple[int, ...] | None


def needs(path: Path) -> Needs:
    """Read what a library asks for.

    Raises:
        BinaryError: the file is no 64-bit ELF or PE library, or is cut short.
    """
    data = path.read_bytes()
    try:
        if data[:5] == b"\x7fELF\x02":
            return _elf(data)
        if data[:2] == b"MZ":
            return Needs(_pe(data), None)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise BinaryError(f"{path.name} is damaged: {error!r}") from error
    raise BinaryError(f"{path.name} is neither a 64-bit ELF library nor a PE one")


def check(path: Path, glibc_floor: tuple[int, ...]) -> Needs:
    """Read what a library asks for, and refuse what not every system has.

    Raises:
        BinaryError: it needs a library that does not come with the system, or a newer C library than the floor.
    """
    found = needs(path)
    system = WINDOWS if path.suffix == ".dll" else LINUX
    foreign = [name for name in found.libraries if not system.fullmatch(name.lower())]
    if foreign:
        raise BinaryError(f"{path.name} needs {', '.join(foreign)}, which not every system has")
    if found.glibc is not None and found.glibc > glibc_floor:
        newest, floor = (".".join(map(str, version)) for version in (found.glibc, glibc_floor))
        raise BinaryError(f"{path.name} needs glibc {newest}, the promise is {floor}")
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("ascii")


def _elf(data: bytes) -> Needs:
    start, size, count = struct.unpack_from("<Q14xHH", data, 32)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]

    def place(address: int) -> int:
        for kind, _, offset, virtual, _, length in headers:
            if kind == 1 and virtual <= address < virtual + length:
                return offset + address - virtual
        raise ValueError(f"no segment holds {address:#x}")

    (dynamic,) = (header for header in headers if header[0] == 2)
    entries = [
        struct.unpack_from("<qQ", data, dynamic[2] + at) for at in range(0, dynamic[5] - 15, 16)
    ]
    table = dict(reversed(entries))
    strings = place(table[_STRINGS])
    libraries = tuple(_text(data, strings + value) for tag, value in entries if tag == _NEEDED)
    versions = []
    at = place(table[_VERSIONS]) if _VERSIONS in table else 0
    for _ in range(table.get(_VERSION_COUNT, 0)):
        _, names, _, first, following = struct.unpack_from("<HHIII", data, at)
        name = at + first
        for _ in range(names):
            _, _, _, text, step = struct.unpack_from("<IHHII", data, name)
            versions.append(_text(data, strings + text))
            name += step
        at += following
    numbers = [word[6:].split(".") for word in versions if word.startswith("GLIBC_2")]
    return Needs(libraries, max((tuple(map(int, n)) for n in numbers), default=(2, 0)))


def _pe(data: bytes) -> tuple[str, ...]:
    (header,) = struct.unpack_from("<I", data, 60)
    if data[header : header + 4] != b"PE\0\0":
        raise ValueError("no PE header")
    sections, optional = struct.unpack_from("<H12xH", data, header + 6)
    at = header + 24
    (magic,) = struct.unpack_from("<H", data, at)
    directory = at + (112 if magic == 0x20B else 96)
    imports, _ = struct.unpack_from("<II", data, directory + 8)
    rows = [struct.unpack_from("<IIII", data, at + optional + i * 40 + 8) for i in range(sections)]

    def place(address: int) -> int:
        for size, virtual, stored, offset in rows:
            if virtual <= address < virtual + max(size, stored):
                return offset + address - virtual
        raise ValueError(f"no section holds {address:#x}")

    names, entry = [], place(imports) if imports else 0
    while entry:
        (name,) = struct.unpack_from("<I", data, entry + 12)
        if name == 0:
            break
        names.append(_text(data, place(name)))
        entry += 20
    return tuple(names)
