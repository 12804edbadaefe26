# SPDX-License-Identifier: Apache-2.0
"""Publishing a folder that many processes write, so that a reader sees all of it or none of it.

[Note: Order of a save]
1. The leading rank clears what an earlier, killed save left, and makes `<tag>.tmp` with a mark in it.
2. Every rank writes its files there, each flushed to the disk, summing what it writes.
3. All ranks tell each other how it went. One failure raises on all of them and the partial folder is removed.
4. The leading rank writes the manifest (sizes and checksums) and the next `latest` beside its place, takes the mark
   away, marks an existing `<tag>`, and flushes all that. It moves an existing `<tag>` aside to `<tag>.old`, renames
   `<tag>.tmp` to `<tag>`, flushes that, then replaces `latest`, and removes `<tag>.old`.
Every rename is preceded by a flush of what it publishes. Killed before the rename: the previous tag is untouched, or
found under `<tag>.old` (`resolve` looks there). Killed after it: the new tag is complete.

Steps 1 and 3 are collective, 2 and 4 are not: training may go on meanwhile (`Publication`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..utils.errors import explain
from . import leftovers
from .crew import Crew
from .digest import CRC32, crc32, text_of
from .format import (
    LATEST,
    MANIFEST,
    PARTIAL_MARK,
    PARTIAL_SUFFIX,
    REPLACED_MARK,
    is_own_file,
    tag_problem,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..ops.aio.queue import FileQueue

_SHARING_ERRORS = (5, 32, 33)  # Windows: access denied, sharing violation, lock violation
_RETRY_SECONDS = 5.0
_FLUSHES = 8
_SUMMED_BESIDE = 1 << 20  # bytes from which a second thread is worth its while

DONE_PREFIX = f"{PARTIAL_MARK}_done_"
"""Files `<prefix><rank>` in a partial folder: a rank that saves while it trains has written all of its own."""


class Disk:
    """Every change that a save makes to the file system: tests replace it to fail or die at each point."""

    def create(self, path: Path) -> BinaryIO:
        """Open a file for writing, truncating it."""
        return open(path, "wb", buffering=0)

    def reopen(self, path: Path) -> BinaryIO:
        """Open a file that is there, to write more into it."""
        return open(path, "r+b", buffering=0)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        while view.nbytes:
            view = view[file.write(view) :]

    def open_queue(self) -> FileQueue:
        """Make a queue for `send` and `settle`."""
        from ..ops.aio.queue import FileQueue

        return FileQueue()

    def send(self, queue: FileQueue, path: Path, offset: int, data: Tensor) -> int:
        """Begin to write the bytes of a host tensor, which must stay as it is until `settle`; returns a ticket."""
        return queue.submit_write(path, offset, data)

    def settle(self, queue: FileQueue, ticket: int) -> None:
        """Wait until what was sent is written."""
        queue.wait(ticket)

    def sync(self, file: BinaryIO) -> None:
        """Make what was written survive a power cut."""
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Make renames inside a folder survive a power cut (Windows has no such call and needs none)."""
        if os.name == "nt":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def replace(self, source: Path, target: Path) -> None:
        """Rename, replacing a file of the target's name."""
        _persist(lambda: os.replace(source, target))

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents; being there is fine."""
        path.mkdir(parents=True, exist_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a file; not being there is fine."""
        _persist(lambda: path.unlink(missing_ok=True))

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and everything in it."""
        _persist(lambda: shutil.rmtree(path))


disk = Disk()


@dataclass(frozen=True)
class Entry:
    """One written file, as the manifest knows it."""

    name: str
    size: int
    crc32: str


class HashedFile:
    """A file that is summed while it is written and flushed to the disk when it is closed, unless told not to.

    Has what `torch.save` needs of a file object: `write` and `flush`.
    """

    def __init__(self, path: Path, flush: bool = True) -> None:
        self.path, self._flushes = path, flush
        self._file = disk.create(path)
        self._sum = 0
        self._size = 0
        self._summer: ThreadPoolExecutor | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`, summing it meanwhile; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self._size += view.nbytes
        if view.nbytes < _SUMMED_BESIDE:
            self._sum = crc32(view, self._sum)
            disk.write(self._file, view)
            return view.nbytes
        if self._summer is None:
            self._summer = ThreadPoolExecutor(1, "checkpoint-sum")
        summed = self._summer.submit(crc32, view, self._sum)
        try:
            disk.write(self._file, view)
        finally:
            self._sum = summed.result()  # the caller's buffer must outlive the summing
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back; here for file-like use."""

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None and self._flushes:
                disk.sync(self._file)
        finally:
            self._file.close()
            if self._summer is not None:
                self._summer.shutdown()

    def entry(self) -> Entry:
        """What the manifest says about this file."""
        return Entry(self.path.name, self._size, text_of(self._sum))


def write_small(path: Path, data: bytes, flush: bool = True) -> Entry:
    """Write a whole file and flush it."""
    with HashedFile(path, flush) as file:
        file.write(data)
    return file.entry()


def replace_file(path: Path, data: bytes, flush: bool = True) -> None:
    """Write a file beside its final place and rename it there: readers see the old or the new content.

    Without `flush` a power cut may leave it empty: for what can be had again.
    """
    temporary = _beside(path, PARTIAL_SUFFIX)
    write_small(temporary, data, flush)
    disk.replace(temporary, path)
    if flush:
        disk.sync_folder(path.parent)


def flush_files(paths: Sequence[Path], folders: Sequence[Path] = ()) -> None:
    """Flush files that were written without it, and folders, side by side: the disk then flushes once, not for each."""

    def flush(path: Path) -> None:
        with open(path, "r+b", buffering=0) as file:
            disk.sync(file)

    def one(path: Path) -> None:
        if path in folders:
            disk.sync_folder(path)
        else:
            _persist(lambda: flush(path))

    everything = [*paths, *folders]
    if len(everything) == 1:
        one(everything[0])
    elif everything:
        with ThreadPoolExecutor(min(len(everything), _FLUSHES), "checkpoint-flush") as pool:
            list(pool.map(one, everything))


def checked_tag(tag: object) -> str:
    """`tag` as a text that names a folder inside the save folder.

    Raises:
        ValueError: it could point elsewhere, or cannot be a folder name on every system.
    """
    text = str(tag)
    if problem := tag_problem(text):
        raise ValueError(
            explain(
                f"unusable checkpoint tag, {problem}",
                got=repr(text),
                expected="a plain folder name",
            )
        )
    return text


def publish(
    save_dir: Path,
    tag: str,
    crew: Crew,
    write: Callable[[Path], Sequence[Entry]],
    *,
    needed: int = 0,
    latest: str | None = LATEST,
) -> Path:
    """Collectively write and publish `save_dir/tag`. See [Note: Order of a save].

    Args:
        save_dir: the folder of all tags; made when missing.
        tag: name of the folder to publish.
        crew: the ranks taking part.
        write: called on every rank with the partial folder; writes this rank's files, returns their entries.
        needed: bytes that this rank is going to write, about.
        latest: name of the file that is to point to the tag, None to leave it alone.

    Returns:
        The published folder.

    Raises:
        DeepSpeedCheckpointError: another rank failed. The failing rank raises its own error. Nothing was published.
        OSError: the disk is full, or will be.
    """
    publication = Publication(save_dir, tag, crew, latest)
    publication.begin(needed)
    return publication.finish(lambda: write(publication.partial))


class Publication:
    """One save on its way: `begin`, then files are written into `partial`, then `finish`.

    Args:
        save_dir, tag, crew, latest: as for `publish`.

    Attributes:
        partial: the folder to write into, between `begin` and `finish`.
        final: what it is going to be.
    """

    def __init__(self, save_dir: Path, tag: str, crew: Crew, latest: str | None = LATEST) -> None:
        self.save_dir, self.tag, self.crew, self.latest = save_dir, checked_tag(tag), crew, latest
        self.final = save_dir / self.tag
        self.partial = _beside(self.final, PARTIAL_SUFFIX)

    def begin(self, needed: int, shared: Sequence[str] | None = None) -> None:
        """Collectively: check that there is room for `needed` bytes of this rank, and make the partial folder.

        Args:
            needed: bytes.
            shared: files that this rank makes for others to write into, too; None on all ranks if there are none.
        """
        with self._cleaned():
            shares = self.crew.together(lambda: (needed, self.crew.leads))
            total = sum(share for share, _ in shares) // sum(leads for _, leads in shares)
            self._lead(lambda: _prepare(self.final, self.partial, total))
            if shared is not None:
                self.crew.together(lambda: self._make_files(shared))

    def _make_files(self, names: Sequence[str]) -> None:
        for name in names:
            disk.create(self.partial / name).close()

    def finish(self, write: Callable[[], Sequence[Entry]]) -> Path:
        """Collectively: call `write` for this rank's entries (it may raise), vote, and publish; returns the folder."""
        written = self.collect(write)
        self._lead(lambda: self.publish_alone(written))
        return self.final

    def collect(self, write: Callable[[], Sequence[Entry]]) -> list[list[Entry]]:
        """Collectively: call `write` for this rank's entries (it may raise), and vote; returns those of all ranks."""
        with self._cleaned():
            return self.crew.together(lambda: list(write()))

    def publish_alone(self, written: Iterable[Iterable[Entry]]) -> None:
        """Without the others: publish what all ranks have written."""
        entries = [entry for of_rank in written for entry in of_rank]
        try:
            _publish(self.save_dir, self.tag, self.final, self.partial, entries, self.latest)
        finally:
            self._let_go()

    def peers(self) -> list[int]:
        """Collectively, after `begin`: the ranks that write into the same folder as this one."""
        marks = self.crew.together(
            lambda: (self.partial / PARTIAL_MARK).read_text(encoding="utf-8")
        )
        return [rank for rank, mark in enumerate(marks) if mark == marks[self.crew.rank]]

    def note_done(self, written: Sequence[Entry]) -> None:
        """Without the others: leave a note beside this rank's files that all of them are there."""
        fields = [asdict(entry) for entry in written]
        note = self.partial / f"{DONE_PREFIX}{self.crew.rank}"
        replace_file(note, json.dumps(fields).encode())

    def noted(self, ranks: Sequence[int]) -> list[list[Entry]] | None:
        """What these ranks have noted, None while one has not."""
        found = []
        for rank in ranks:
            note = self.partial / f"{DONE_PREFIX}{rank}"
            if not note.exists():
                return None
            noted = json.loads(note.read_text(encoding="utf-8"))
            found.append([Entry(**fields) for fields in noted])
        return found

    def _lead(self, action: Callable[[], None]) -> None:
        self.crew.together(lambda: action() if self.crew.leads else None)

    def abandon(self) -> None:
        """Remove the partial folder."""
        if self.crew.leads:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        """Nobody here writes into the partial folder any more: what is left of it may be cleared."""
        leftovers.begun.discard(self.partial.resolve())

    @contextlib.contextmanager
    def _cleaned(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.abandon()
            raise
        except BaseException:
            self._let_go()
            raise


def resolve(save_dir: Path, tag: str) -> Path:
    """The folder that holds a tag's last complete state (the tag may have been moved aside by a killed save)."""
    final = save_dir / checked_tag(tag)
    if final.exists():
        return final
    found = [path for path in leftovers.asides(final) if path.is_dir()]
    found = [path for path in found if not (path / PARTIAL_MARK).exists()]
    return min(found, key=lambda path: not (path / REPLACED_MARK).exists(), default=final)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _prepare(final: Path, partial: Path, needed: int) -> None:
    disk.make_folder(final.parent)
    leftovers.clear(final.parent, partial, disk)
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            explain(
                f"not enough space for a checkpoint in {final.parent}",
                got=f"{free:,} bytes free",
                expected=f"about {needed:,}",
                fix="Free some space, or save elsewhere. Nothing was written.",
            ),
        )
    if partial.is_symlink():
        what = "the folder for a checkpoint's files is a link to elsewhere"
        raise OSError(errno.ELOOP, explain(what, got=str(partial), fix="Remove the link."))
    leftovers.begun.add(partial.resolve())
    disk.make_folder(partial)
    # not flushed: it tells those who find a killed save whether its writer lives; after a power cut none does
    mark = f"{socket.gethostname()} {os.getpid()}\n".encode()
    write_small(partial / PARTIAL_MARK, mark, flush=False)


def _publish(
    save_dir: Path,
    tag: str,
    final: Path,
    partial: Path,
    entries: Sequence[Entry],
    latest: str | None,
) -> None:
    files = {
        e.name: {"size": e.size, CRC32: e.crc32} for e in entries if (partial / e.name).exists()
    }
    manifest = {"format": 2, "tag": tag, "files": dict(sorted(files.items()))}
    small = [partial / MANIFEST]
    write_small(small[0], json.dumps(manifest, indent=1).encode(), flush=False)
    for note in sorted(partial.glob(f"{DONE_PREFIX}*")):
        disk.remove(note)
    disk.remove(partial / PARTIAL_MARK)
    pointer = None if latest is None else save_dir / latest
    if pointer is not None:
        small.append(_beside(pointer, PARTIAL_SUFFIX))
        write_small(small[-1], tag.encode(), flush=False)
    aside = leftovers.free_aside(final)
    replacing = final.exists()
    if replacing:
        small.append(final / REPLACED_MARK)
        write_small(small[-1], b"", flush=False)
    flush_files(small, [partial])
    if replacing:
        disk.replace(final, aside)
    disk.replace(partial, final)
    disk.sync_folder(final.parent)
    if pointer is not None:
        disk.replace(_beside(pointer, PARTIAL_SUFFIX), pointer)
        disk.sync_folder(save_dir)
    if replacing:
        _keep_foreign(aside, final)
        write_small(aside / PARTIAL_MARK, b"")
        disk.remove_tree(aside)


def _keep_foreign(aside: Path, final: Path) -> None:
    """Move what somebody else put into the replaced tag folder over to the new one."""
    for item in sorted(aside.iterdir()):
        if not is_own_file(item.name) and not (final / item.name).exists():
            disk.replace(item, final / item.name)


def _persist(action: Callable[[], object]) -> None:
    """Run `action`; on Windows try again for a few seconds while another program holds the file."""
    deadline = time.monotonic() + _RETRY_SECONDS
    pause = 0.01
    while True:
        try:
            action()
            return
        except OSError as error:
            if not _may_pass(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _may_pass(error: OSError, windows: bool = os.name == "nt") -> bool:
    """Whether another program (a scanner of files, a backup) may just hold the file; `open` gives errno alone."""
    code = getattr(error, "winerror", None)
    return code in _SHARING_ERRORS or (windows and code is None and error.errno == errno.EACCES)
