# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoint files without running anything they contain.

A `.pt` file is a pickle, and a pickle is a program. This reader executes only pickles whose every global is on a list
of harmless data types, maps the few classes that older checkpoints contain to inert records, and refuses the rest by
name. Files are checked against the manifest of their folder first, where there is one.
"""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..utils.env import DS_TRUST_CHECKPOINTS
from ..utils.errors import DeepSpeedCheckpointError, explain
from .digest import CRC32, SHA256, of_file
from .format import MANIFEST, MODEL_FILES, PARTIAL_MARK
from .harmless import Refused, check_call, harmless

_MAX_PICKLE = 1 << 30


_allowed: dict[tuple[str, str], Any] = {}
_trusted: dict[tuple[str, str], Any] = {}


def add_safe_classes(*classes: type) -> None:
    """Let checkpoints contain objects of these classes (in `client_state`, say).

    Only do so for classes whose construction from hostile values does no harm.

    Example:
        >>> import fractions, deepspeed.checkpoint
        >>> deepspeed.checkpoint.add_safe_classes(fractions.Fraction)
    """
    for cls in classes:
        _trusted[cls.__module__, cls.__qualname__] = cls


def _look_up(module: str, name: str) -> Any:
    if not _allowed:
        _allowed.update(harmless())
    known = getattr(torch.serialization, "get_safe_globals", list)()
    trusted = _trusted | {(c.__module__, c.__qualname__): c for c in known if isinstance(c, type)}
    for table in (_allowed, trusted):
        if (module, name) in table:
            return table[module, name]
    raise Refused(f"{module}.{name}")


def is_readable_class(cls: type) -> bool:
    """Whether this reader accepts objects of a class (a writer asks, to warn in time)."""
    try:
        _look_up(cls.__module__, cls.__qualname__)
    except Refused:
        return False
    return True


class _Unpickler(pickle._Unpickler):  # the C one offers no way to guard its opcodes
    """Executes a pickle whose globals are all harmless."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    sizes: ClassVar[dict[str, int] | None] = None

    def load_binpersid(self) -> None:
        if self.sizes is not None:
            _check_storage(self.stack[-1], self.sizes)
        super().load_binpersid()

    def find_class(self, module: str, name: str) -> Any:
        try:
            found = _look_up(module, name)
        except Refused:
            if not DS_TRUST_CHECKPOINTS.get():
                raise
            found = super().find_class(module, name)
        self.__dict__.setdefault("_callable_ids", set()).add(id(found))
        return found

    def load_reduce(self) -> None:
        function = self.stack[-2]
        named = id(function) in self.__dict__.get("_callable_ids", ())
        if not named and not DS_TRUST_CHECKPOINTS.get():
            raise Refused(f"a call of {function!r}")
        check_call(function, self.stack[-1])
        super().load_reduce()

    def load_newobj(self) -> None:
        check_call(self.stack[-2], self.stack[-1])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        check_call(self.stack[-3], self.stack[-2])
        super().load_newobj_ex()

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        check_call(kind, tuple(arguments))
        super()._instantiate(kind, arguments)

    def load_build(self) -> None:
        target = self.stack[-2]
        if isinstance(
            target, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
        ):
            raise Refused(f"a change of {target!r}")
        super().load_build()

    def load_bytearray8(self) -> None:
        raise Refused("bytearray of a declared size")

    dispatch[pickle.BINPERSID[0]] = load_binpersid
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _check_storage(saved_id: Any, sizes: dict[str, int]) -> None:
    """Refuse a storage that is larger than the record that holds it, or smaller by an element."""
    _, kind, key, _, count = saved_id
    dtype = torch.uint8 if kind is torch.UntypedStorage else kind._dtype
    held = sizes[f"data/{key}"]
    if not 0 <= held - count * dtype.itemsize < dtype.itemsize:
        raise ValueError(f"a storage of {count} elements in a record of {held} bytes")


def _restricted(sizes: dict[str, int] | None) -> Any:
    """What `torch.load` takes for the module `pickle`."""
    kind = type("Unpickler", (_Unpickler,), {"sizes": sizes})
    return types.SimpleNamespace(
        __name__="deepspeed.checkpoint.reader",
        Unpickler=kind,
        load=lambda file, **options: kind(file, **options).load(),
        loads=lambda data, **options: kind(io.BytesIO(data), **options).load(),
        UnpicklingError=pickle.UnpicklingError,
    )


def _by_torch(path: Path, map_location: Any, mmap: bool, sizes: dict[str, int] | None) -> Any:
    return torch.load(
        str(path),
        map_location=map_location,
        pickle_module=_restricted(sizes),
        weights_only=False,
        mmap=mmap,
    )


def load_file(
    path: str | os.PathLike[str],
    map_location: Any = "cpu",
    *,
    mmap: bool = True,
) -> Any:
    """Read one checkpoint file.

    Args:
        path: the file.
        map_location: as for `torch.load`.
        mmap: map tensors from the file rather than read them (pages are read when touched; copy what outlives the
            file). Falls back to reading where the file or torch cannot.

    Returns:
        The object in the file; classes of older checkpoints come as `Record`s, enumerations as numbers.

    Raises:
        DeepSpeedCheckpointError: the file is damaged, or holds something that this reader refuses.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    sizes = _check_archive(path)
    try:
        return _by_torch(path, map_location, mmap and sizes is not None, sizes)
    except Refused as error:
        raise DeepSpeedCheckpointError(
            explain(
                f"{path} is refused, because reading it would run more than data",
                got=str(error),
                expected="tensors, numbers, texts and plain containers of them",
                fix="If you trust the file's origin, allow the class by deepspeed.checkpoint.add_safe_classes(...), "
                f"or set {DS_TRUST_CHECKPOINTS.name}=1 to allow everything.",
            )
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def damaged(path: Path, why: str) -> DeepSpeedCheckpointError:
    """The error for a file that is not what it should be."""
    return DeepSpeedCheckpointError(
        explain(
            f"{path} is damaged or not a checkpoint",
            got=why,
            fix="Load another tag (load_checkpoint(..., tag=...)); the files of this one cannot be used.",
        )
    )


def _check_archive(path: Path) -> dict[str, int] | None:
    """Refuse archives that lie about their size or hold code; return their records' sizes, None if it is no archive."""
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        raise damaged(path, "an empty file")
    if start != b"PK":
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
    except Exception as error:  # zipfile raises what it likes
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    size = path.stat().st_size
    if len({item.filename for item in items}) != len(items):
        raise damaged(path, "two records of one name")
    for item in items:
        inside = item.filename.partition("/")[2]
        if item.compress_type != zipfile.ZIP_STORED or item.file_size != item.compress_size:
            raise damaged(path, f"compressed record {item.filename!r}")
        if item.header_offset + item.file_size > size:
            raise damaged(path, f"record {item.filename!r} reaches beyond the end of the file")
        if inside in ("constants.pkl", "code") or inside.startswith("code/"):
            raise damaged(path, "a TorchScript program")
        if inside == "data.pkl" and item.file_size > _MAX_PICKLE:
            raise damaged(path, f"{item.file_size} bytes of structure")
    if sum(item.file_size for item in items) > size:
        raise damaged(path, "records that overlap")
    return {item.filename.partition("/")[2]: item.file_size for item in items}


class Folder:
    """The files of one tag, each checked against the manifest before it is first read.

    Args:
        path: the tag's folder.
        verify: whether sizes and checksums are compared (folders without a manifest have none).

    Raises:
        DeepSpeedCheckpointError: the folder is an unfinished save, or its manifest is damaged.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = path
        if (path / PARTIAL_MARK).exists():
            raise damaged(path, "a save that did not finish")
        self._expected = _read_manifest(path / MANIFEST) if verify else {}
        self._checked: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.path / name).is_file()

    def glob(self, pattern: str) -> list[str]:
        """Names of the files that match, sorted."""
        return sorted(p.name for p in self.path.glob(pattern) if p.is_file())

    def model_files(self) -> list[str]:
        """Names of the files of model states, one for each model-parallel rank."""
        return next(filter(None, map(self.glob, MODEL_FILES)), [])

    def glob_in(self, folder: str, pattern: str) -> list[str]:
        """As `glob`, in a folder of this one; names with the folder's."""
        found = (self.path / folder).glob(pattern)
        return sorted(f"{folder}/{p.name}" for p in found if p.is_file())

    def load(self, name: str, map_location: Any = "cpu", *, mmap: bool = True) -> Any:
        """Check one file and read it; see `load_file`."""
        self.check(name)
        return load_file(self.path / name, map_location, mmap=mmap)

    def check(self, name: str) -> None:
        """Compare a file with the manifest.

        Raises:
            DeepSpeedCheckpointError: it is missing, has another size, or another content.
        """
        if name in self._checked or name not in self._expected:
            return
        path, entry = self.path / name, self._expected[name]
        if not path.is_file():
            raise damaged(path, "no such file, but the manifest lists it")
        if path.stat().st_size != entry["size"]:
            raise damaged(
                path, f"{path.stat().st_size} bytes where the manifest says {entry['size']}"
            )
        algorithm = next(name for name in (CRC32, SHA256) if name in entry)
        if of_file(path, algorithm) != entry[algorithm]:
            raise damaged(
                path, f"content that differs from what was saved (its {algorithm} is another)"
            )
        self._checked.add(name)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): _expected(entry) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, str(error)) from error


def _expected(entry: dict[str, Any]) -> dict[str, Any]:
    algorithm = next((name for name in (CRC32, SHA256) if name in entry), None)
    if algorithm is None:
        raise ValueError(f"no checksum that is known among {', '.join(map(str, entry))}")
    return {"size": int(entry["size"]), algorithm: str(entry[algorithm])}


def read_tag(save_dir: Path, pointer: str) -> str | None:
    """The tag that a pointer file (`latest`) names, None when there is no such file.

    Raises:
        DeepSpeedCheckpointError: the file does not hold a tag.
    """
    path = save_dir / pointer
    if not path.is_file():
        return None
    text = path.read_bytes()[:4096].decode("utf-8", errors="replace").strip()
    if not text:
        raise damaged(path, "an empty file")
    return text


def own_memory(value: Any, copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Any:
    """`value` with every tensor in nested containers copied, so that it outlives the mapped file."""
    if isinstance(value, torch.Tensor):
        return copy(value)
    if isinstance(value, dict):
        kind = type(value) if type(value) in (dict, collections.OrderedDict) else None
        items = [(key, own_memory(item, copy)) for key, item in value.items()]
        return kind(items) if kind else value
    if type(value) in (list, tuple):
        return type(value)(own_memory(item, copy) for item in value)
    return value
