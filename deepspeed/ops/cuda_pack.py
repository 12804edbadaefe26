# SPDX-License-Identifier: Apache-2.0
"""Reader of kernels.zip, which trusts nothing in it: each number, name and hash is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.git_version_info import version
from deepspeed.utils.errors import DeepSpeedError, explain

FORMAT = 1
# No kernel source or image comes near it; a forged size must not fill the memory.
_LARGEST = 32 << 20
_ARGUMENTS = re.compile(r"[Pqif]{0,64}")
_ARCH = re.compile(r"(sm|compute)_(\d{2,3})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KernelPackError(DeepSpeedError, RuntimeError):
    """The pack of CUDA kernels is damaged or of another version; the message holds the cause and the cure."""


class Image(NamedTuple):
    """One compiled file of the pack: its architecture as in ``sm_80``, place, size and hash."""

    arch: str
    file: str
    size: int
    sha256: str

    @property
    def is_ptx(self) -> bool:
        """Whether the driver has yet to compile it."""
        return self.arch.startswith("compute_")

    @property
    def capability(self) -> tuple[int, int]:
        """The architecture as (major, minor): the last digit is the minor."""
        return divmod(int(self.arch.rpartition("_")[2]), 10)


class Unit(NamedTuple):
    """The kernels of one source file: argument codes by name, images by architecture."""

    kernels: dict[str, str]
    images: dict[str, Image]


class KernelPack:
    """An opened pack whose index was checked; images are checked when they are read.

    Attributes:
        path: the file.
        source_hash: hash of all sources.
        compiler: what made the images, or None where there are sources only.
        driver_floor: least cuDriverGetVersion for cubins.
        ptx_driver_floor: the same for PTX.
        units: the kernels by unit.

    Raises:
        KernelPackError: the file is no pack of this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = self._index()
        try:
            self._read_index(index)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._broken(f"its index is malformed ({error!r})") from error

    def image(self, unit: str, arch: str) -> bytes:
        """Return one compiled image.

        Raises:
            KernelPackError: it is missing, cut short or changed.
        """
        image = self.units[unit].images[arch]
        content = self._member(image.file)
        if len(content) != image.size:
            raise self._broken(
                f"{image.file} has {len(content)} bytes, the index says {image.size}"
            )
        if hashlib.sha256(content).hexdigest() != image.sha256:
            raise self._broken(f"{image.file} does not match the hash in the index")
        return content

    def sources(self) -> dict[str, str]:
        """Return the kernel sources by file name.

        Raises:
            KernelPackError: they are missing, or do not match the index.
        """
        texts = {}
        for name in self._source_names:
            try:
                texts[name] = self._member(f"src/{name}").decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._broken(f"src/{name} is no text") from error
        if hash_of_sources(texts) != self.source_hash:
            raise self._broken("its sources do not match the hash in the index")
        return texts

    def _index(self) -> Any:
        try:
            index = json.loads(self._member("index.json"))
        except (ValueError, RecursionError) as error:
            raise self._broken(f"its index is no JSON ({error})") from error
        found = index.get("format") if isinstance(index, dict) else None
        if found != FORMAT or isinstance(found, bool):
            raise self._broken(f"its format is {found!r}, this package reads {FORMAT}")
        if index.get("version") != version:
            raise self._broken(
                f"it belongs to version {index.get('version')!r}, this package is {version!r}"
            )
        return index

    def _read_index(self, index: dict[str, Any]) -> None:
        self.source_hash = _matching(_HASH, index["source_hash"])
        self.compiler = None if index["compiler"] is None else _text(index["compiler"])
        self.driver_floor = _count(index["driver_floor"])
        self.ptx_driver_floor = _count(index["ptx_driver_floor"])
        self._source_names = [_file_name(name) for name in index["sources"]]
        self.units = {
            _matching(_NAME, name): Unit(
                {
                    _matching(_NAME, kernel): _matching(_ARGUMENTS, codes)
                    for kernel, codes in unit["kernels"].items()
                },
                {arch: _image(arch, image) for arch, image in unit["images"].items()},
            )
            for name, unit in index["units"].items()
        }

    def _member(self, name: str) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as pack:
                info = pack.getinfo(name)
                if max(info.file_size, info.compress_size) > _LARGEST:
                    raise self._broken(f"{name} claims {info.file_size} bytes")
                return pack.read(info)
        except KeyError as error:
            raise self._broken(f"it has no {name}") from error
        except KernelPackError:
            raise
        # what zipfile raises for hostile bytes is not one family: bad CRCs, struct errors, unknown
        # methods, encrypted members, negative seeks, undecodable names
        except Exception as error:
            raise self._broken(f"{name} cannot be read ({error})") from error

    def _broken(self, cause: str) -> KernelPackError:
        return KernelPackError(
            explain(
                f"the pack of CUDA kernels {self.path} is unusable: {cause}",
                fix="Install deepspeed again (pip install --force-reinstall), "
                "or set DS_DISABLE_NATIVE=1 to run on torch alone.",
            )
        )


def hash_of_sources(texts: dict[str, str]) -> str:
    """Return the hash by which the build names a set of sources."""
    total = hashlib.sha256()
    for name, text in sorted(texts.items()):
        total.update(f"{name}\0{len(text)}\0{text}".encode())
    return total.hexdigest()


def _image(arch: str, facts: dict[str, Any]) -> Image:
    size = _count(facts["size"])
    return Image(
        _matching(_ARCH, arch), _file_name(facts["file"]), size, _matching(_HASH, facts["sha256"])
    )


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 31:
        raise ValueError(value)
    return value


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not value or "/" in value or "\\" in value:
        raise ValueError(value)
    return value
