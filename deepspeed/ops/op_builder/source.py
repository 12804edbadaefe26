# SPDX-License-Identifier: Apache-2.0
"""A user's own C++ op: compiled with the compiler that is there, found again by its content, published whole.

A module is kept in a folder named by its settings, beside the hashes of the files that it was made of: it is used
again as long as these files are the same, whatever their dates. Builders work in folders of their own and rename the
finished one into place, so no process ever loads half a module. A lock that the system holds, and drops when its
process dies, only saves several processes from doing the same work; where a file system has no locks they do.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from deepspeed.ops.op_builder import toolchain
from deepspeed.ops.op_builder.toolchain import SourceOpError
from deepspeed.utils import env
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', re.MULTILINE)
_OF_TORCH = re.compile(r"(torch|ATen|c10)/")
_PATIENCE = 600.0  # seconds for which another process is believed to be compiling
_KEPT = 4  # builds of one op from different contents of its files


class SourceOp(NamedTuple):
    """What to compile; all of it but the files' content is in the name of the cache's folder.

    Attributes:
        name: of the module, as PYBIND11_MODULE (or TORCH_EXTENSION_NAME in its place) has it.
        sources: absolute paths of the C++ and CUDA files.
        include_paths: further folders of headers.
        flags: for the C++ compiler.
        cuda_flags: for nvcc.
        link_flags: for the linker.
        libraries: names of libraries to link.
        torch: whether libtorch is linked; None: if a file includes its headers.
        cuda: whether C++ sources, too, are compiled and linked for CUDA.
    """

    name: str
    sources: tuple[str, ...]
    include_paths: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    cuda_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    torch: bool | None = None
    cuda: bool = False

    @property
    def has_cuda(self) -> bool:
        """Whether it takes the CUDA toolkit."""
        return self.cuda or any(Path(source).suffix == ".cu" for source in self.sources)

    def uses_torch(self) -> bool:
        """Say whether a source, or a header of the user's that it includes, includes a header of torch."""
        if self.torch is not None or self.has_cuda:
            return self.torch is not False
        waiting, seen = [Path(source) for source in self.sources], set()
        while waiting:
            path = waiting.pop()
            if path in seen:
                continue
            seen.add(path)
            words = _INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace"))
            if any(_OF_TORCH.match(word) for word in words):
                return True
            places = (path.parent, *map(Path, self.include_paths))
            waiting += [
                place / word for word in words for place in places if (place / word).is_file()
            ]
        return False


def obstacle(op: SourceOp) -> str | None:
    """Return why an op cannot be compiled here, or None."""
    missing = [source for source in op.sources if not Path(source).is_file()]
    if missing:
        return f"there is no file {', '.join(missing)}"
    try:
        toolchain.ninja()
        toolchain.compiler_for(op.uses_torch())
    except SourceOpError as error:
        return str(error)
    return None


def load(op: SourceOp, verbose: bool = False) -> ModuleType:
    """Return the module, compiled if it is not in the cache.

    Raises:
        SourceOpError: a tool is missing, the compiler refuses the sources (its words are in the message), the cache
            cannot be written, or the module cannot be imported.
    """
    if op.has_cuda:
        return _load_by_torch(op, verbose)
    plan = toolchain.plan(op)
    entry = folder() / f"{op.name}-{_digest(plan.settings())}"
    made = _find(entry)
    if made is None:
        _make_folder(entry)
        with _one_builder(entry, op.name) as alone:
            made = _find(entry) or _build(plan, entry, alone, verbose)
    return _import(op.name, made)


def folder() -> Path:
    """Return where compiled ops are kept: below TORCH_EXTENSIONS_DIR, else in the user's cache folder."""
    chosen = env.TORCH_EXTENSIONS_DIR.get()
    if chosen:
        return Path(chosen) / "deepspeed"
    below = ("AppData", "Local") if sys.platform == "win32" else (".cache",)
    return Path.home().joinpath(*below, "deepspeed", "source_ops")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make_folder(entry: Path) -> None:
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceOpError(
            explain(
                f"the folder of compiled ops {entry} cannot be made",
                got=str(error),
                fix="Name a folder that can be written in TORCH_EXTENSIONS_DIR.",
            )
        ) from error


def _find(entry: Path) -> Path | None:
    """Return a whole module that was made of the files as they are now."""
    found = map(_whole, entry.glob("made-*"))
    return next((module for module in found if module is not None), None)


def _whole(made: Path) -> Path | None:
    """Return the module in a folder if it and the files that it was made of are as they were."""
    try:
        told = json.loads((made / "made_of.json").read_text(encoding="utf-8"))
        module = made / told["module"]
        hashes = {str(module): told["sha256"], **told["files"]}
        return module if all(_hash_of(Path(path)) == hashes[path] for path in hashes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # made of files that are gone, or damaged: it is made again


@contextlib.contextmanager
def _one_builder(entry: Path, name: str) -> Iterator[bool]:
    """Wait until no other process compiles this op; gives whether that is certain."""
    # torch requires filelock, and so it is there
    from filelock import FileLock, Timeout

    lock, alone = FileLock(entry / "lock"), False
    told = f"waiting for another process to compile the op {name} ({entry / 'lock'})"
    late = f"another process has been compiling the op {name} for {_PATIENCE:.0f} s: not waiting on"
    for seconds, words in ((2.0, told), (_PATIENCE, late)):
        try:
            lock.acquire(timeout=seconds)
            alone = True
            break
        except Timeout:
            logger.warning(words)
        except (OSError, NotImplementedError) as error:
            logger.info("no lock on %s: %s", entry, error)
            break
    try:
        yield alone
    finally:
        if alone:
            lock.release()


def _build(plan: toolchain.Plan, entry: Path, alone: bool, verbose: bool) -> Path:
    if alone:
        # what builders left that were killed
        for left in entry.glob("building-*"):
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="building-", dir=entry))
    try:
        files = toolchain.run(plan, work, verbose)
        record = {
            "module": plan.module,
            "sha256": _hash_of(work / plan.module),
            "files": {str(path): _hash_of(path) for path in files},
        }
        (work / "made_of.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return _publish(work, entry, _digest(record["files"])) / plan.module


def _publish(work: Path, entry: Path, digest: str) -> Path:
    """Rename a finished folder to the name by which it is found, and drop the oldest ones."""
    final = entry / f"made-{digest}"
    try:
        if _whole(final) is not None:  # a builder without a lock was faster
            return final
        shutil.rmtree(final, ignore_errors=True)  # damaged
        os.replace(work, final)
    except OSError as error:
        logger.info("the compiled op stays in %s: %s", work, error)
        return work
    others = [path for path in entry.glob("made-*") if path != final]
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[: -_KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SourceOpError(
            explain(
                f"the compiled op {name} cannot be imported",
                got=str(error),
                expected=f"PYBIND11_MODULE({name}, m) or PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) "
                "in one source, and every symbol defined",
                fix=f"Correct the sources or the libraries; the module is {path}.",
            )
        ) from error
    return module


def _load_by_torch(op: SourceOp, verbose: bool) -> Any:
    """Sources for nvcc: torch knows its flags. Its own lock outlives a killed builder, so ours stands before it."""
    from torch.utils import cpp_extension

    entry = folder() / f"{op.name}-{_digest([op, *toolchain.versions()])}"
    _make_folder(entry)
    with _one_builder(entry, op.name) as alone:
        if alone:
            (entry / "build" / "lock").unlink(missing_ok=True)
        (entry / "build").mkdir(exist_ok=True)
        return cpp_extension.load(
            name=op.name,
            sources=list(op.sources),
            extra_include_paths=list(op.include_paths),
            extra_cflags=list(op.flags),
            extra_cuda_cflags=list(op.cuda_flags),
            extra_ldflags=[*op.link_flags, *(f"-l{name}" for name in op.libraries)],
            build_directory=str(entry / "build"),
            with_cuda=True,
            verbose=verbose,
        )
