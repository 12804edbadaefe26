# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoint files: plain containers and tensors, so that any reader can take them without running code."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..utils.logging import logger
from .archive import Archive
from .atomic import Entry, HashedFile
from .reader import is_readable_class
from .stream import Settings, write_archive

_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.dtype,
    torch.device,
    torch.Size,
)
_SLACK = 0.9
"""A tensor is copied out of its storage before writing when the file's tensors cover less than this share of it."""

_warned: set[type] = set()


def save_file(
    path: Path, content: Any, *, as_zip: bool = True, settings: Settings | None = None
) -> Entry:
    """Write one file and flush it to the disk.

    Args:
        path: the file.
        content: what to save; tensors that are small views of large storages are copied out of them first.
        as_zip: torch's zip format rather than its old one.
        settings: how the zip format is written; the fast way if None.

    Returns:
        The manifest's entry for it.
    """
    if as_zip:
        return write_archive(path, Archive.of(compact(content)), settings)
    with HashedFile(path) as file:
        torch.save(compact(content), file, _use_new_zipfile_serialization=False)
    return file.entry()


def plain(value: Any) -> Any:
    """`value` with everything but containers, tensors and numbers turned into text (for configurations)."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in _LEAVES:
        return value
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)


def attributes(**fields: Any) -> OrderedDict[str, Any]:
    """A plain object with attributes, in the one form that torch's restricted reader rebuilds.

    Upstream's tools read `.numel` and `.start` of an object here. An ordered dict may carry attributes through a pickle,
    and `torch.load(weights_only=True)` accepts it; the fields are its items as well.

    Example:
        >>> attributes(numel=3, start=0).numel
        3
    """
    made = OrderedDict(fields)
    made.__dict__.update(fields)
    return made


def warn_of_objects(value: Any, where: str) -> None:
    """Warn, once for a class, of objects that `load_checkpoint` is going to refuse."""
    for kind in sorted(foreign_classes(value) - _warned, key=str):
        _warned.add(kind)
        logger.warning(
            f"{where} holds a {kind.__module__}.{kind.__qualname__}: a checkpoint with it loads only after "
            "deepspeed.checkpoint.add_safe_classes(...) of that class, or with DS_TRUST_CHECKPOINTS=1. "
            "Save its state as a dict of numbers, texts and tensors instead."
        )


def foreign_classes(value: Any) -> set[type]:
    """The classes of objects inside `value` that our reader refuses."""
    return {type(item) for item in _walk(value) if not _is_known(item)}


def _is_known(item: Any) -> bool:
    return isinstance(item, torch.Tensor) or type(item) in _LEAVES or is_readable_class(type(item))


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(key)
            yield from _walk(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _walk(item)
    elif not isinstance(value, (torch.Tensor, type)) and type(value) not in _LEAVES:
        yield from (
            part for item in getattr(value, "__dict__", {}).values() for part in _walk(item)
        )


def tensor_bytes(value: Any) -> int:
    """Bytes of the distinct storages below the tensors in nested containers: about what a file of them takes."""
    sizes = {}
    for tensor in _tensors(value):
        sizes[_storage_key(tensor)] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def compact(value: Any) -> Any:
    """`value` with views of mostly unused storages replaced by copies, and of those that end in a
    part of an element; tensors that alias go on aliasing."""
    covered: dict[Any, dict[Any, int]] = {}
    storages: dict[Any, int] = {}
    odd: set[Any] = set()
    for tensor in _tensors(value):
        key = _storage_key(tensor)
        storages[key] = tensor.untyped_storage().nbytes()
        if storages[key] % tensor.element_size():
            odd.add(key)
        covered.setdefault(key, {})[_view_key(tensor)] = tensor.numel() * tensor.element_size()
    wasteful = {key for key, size in storages.items() if sum(covered[key].values()) < _SLACK * size}
    wasteful |= odd  # torch itself cannot read those
    if not wasteful:
        return value
    copies: dict[Any, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if not _has_storage(tensor) or _storage_key(tensor) not in wasteful:
            return tensor
        key = _view_key(tensor)
        if key not in copies:
            copies[key] = tensor.detach().clone()
        return copies[key]

    return _mapped(value, copied)


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return (item for item in _walk(value) if isinstance(item, torch.Tensor) and _has_storage(item))


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def _storage_key(tensor: torch.Tensor) -> Any:
    storage = tensor.untyped_storage()
    return storage.device, storage.data_ptr() or id(tensor)


def _view_key(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr() or id(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (dict, OrderedDict):
        made = type(value)((key, _mapped(item, change)) for key, item in value.items())
        if getattr(value, "__dict__", None):
            made.__dict__.update(vars(value))
        return made
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
