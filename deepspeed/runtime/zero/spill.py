# SPDX-License-Identifier: Apache-2.0
"""State that lives in files between uses (ZeRO-Infinity, arXiv:2104.07857): slices of parameters, and of states.

Reads and writes run beside the caller. An error of the disk is raised where the result is needed, with the file, the
place and the cause in it.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.ops.aio.buffers import locked_tensor
from deepspeed.ops.aio.library import Options
from deepspeed.ops.aio.queue import FileQueue
from deepspeed.ops.norms import squared_norm
from deepspeed.utils.errors import DeepSpeedConfigError, explain

from .plan import WRITES_BEHIND

# Files are laid out so that every piece can go to the device without a copy.
_ALIGNMENT = 4096
MASTER = "master"

_in_use: set[Path] = set()


class SpillFolder:
    """A folder of one rank for files that do not outlive the run.

    Args:
        folder: made anew; what was in it is removed. Where another `SpillFolder` of this process has it, a neighbour of it.
        options: block size, depth and the like of the file queue.

    Raises:
        OSError: if the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, options: Options | None = None) -> None:
        folder = _not_in_use(folder)
        self.folder = folder
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "probe").write_bytes(b"x")
            (folder / "probe").unlink()
        except OSError as error:
            raise OSError(
                error.errno,
                explain(
                    "the folder for offloaded state cannot be used",
                    got=f"{folder}: {error.strerror}",
                    expected="a folder that this process may write to, on a disk with room",
                    fix="correct nvme_path in the configuration",
                ),
            ) from error
        _in_use.add(folder)
        self.queue = FileQueue(options)
        self.writing: deque[tuple[SpilledGrad, int]] = deque()
        self._idle: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._lent: set[int] = set()
        self._names = itertools.count()
        # Also where nobody closes it: the files are of no use to anyone else.
        self._discard = weakref.finalize(self, _discard, folder, self.queue)

    def new_name(self) -> str:
        """A file name that no other state of this folder has."""
        return f"{next(self._names)}.tensor.swp"

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer for file I/O, its contents undefined; give it back with `recycle`."""
        idle = self._idle.get((numel, dtype))
        buffer = idle.pop() if idle else locked_tensor(numel, dtype)
        self._lent.add(buffer.data_ptr())
        return buffer

    def recycle(self, buffer: torch.Tensor) -> None:
        """Take back what `buffer` gave, for the next one of its size; other tensors are nothing to it."""
        if buffer.data_ptr() in self._lent:
            self._lent.remove(buffer.data_ptr())
            self._idle.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def close(self) -> None:
        """Stop reading and writing, and remove the files."""
        self._discard()


def _not_in_use(folder: Path) -> Path:
    """The folder, or the first neighbour of it that no engine of this process has its files in."""
    names = itertools.chain([folder.name], (f"{folder.name}-{n}" for n in itertools.count(2)))
    return next(place for name in names if (place := folder.with_name(name)) not in _in_use)


def _discard(folder: Path, queue: FileQueue) -> None:
    queue.close()
    _in_use.discard(folder)
    shutil.rmtree(folder, ignore_errors=True)


def open_folder(
    nvme_path: str | Path | None, names: Iterable[str], aio: Mapping[str, Any], axis: Axis
) -> SpillFolder:
    """The folder of this rank for state that an `offload_*` section sends to NVMe; a collective of `axis`.

    Args:
        nvme_path: what the section names.
        names: folders below it.
        aio: section `aio`, with all defaults.
        axis: all ranks.

    Raises:
        DeepSpeedConfigError: no `nvme_path`.
        OSError: the folder cannot be used, here or by another rank.
    """
    if nvme_path is None:
        raise DeepSpeedConfigError(
            explain(
                "offloading to NVMe needs a folder",
                got='"device": "nvme" without "nvme_path"',
                expected="a folder on the disk to use",
                fix='add "nvme_path" to the same section',
            )
        )
    options = Options(
        block_size=aio["block_size"],
        queue_depth=aio["queue_depth"],
        single_submit=aio["single_submit"],
        overlap_events=aio["overlap_events"],
        intra_op_parallelism=aio["intra_op_parallelism"],
    )
    with together(axis, "use its folder for offloaded state"):
        return SpillFolder(Path(nvme_path).joinpath(*names, f"rank{axis.rank}"), options)
    raise AssertionError("together() raised nothing for an error")


@contextlib.contextmanager
def together(axis: Axis, what: str) -> Iterator[None]:
    """Extent whose OSError on one rank of `axis` is an OSError on all of them, so that nobody waits for anybody.

    Args:
        axis: the ranks; all of them must enter.
        what: what the others could not do, for the message.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    if flat.all_ok(failure is None, axis):
        return
    raise failure or OSError(
        explain(
            f"another rank could not {what}",
            got="an error of its files",
            fix="see that rank's message, and resume from the last checkpoint",
        )
    )


class SpilledSlice:
    """This rank's slice of one sharded parameter, in a file of its own.

    Args:
        folder: where the file lies.
        name: of the file.
        values: flat slice, in host memory or not.
    """

    def __init__(self, folder: SpillFolder, name: str, values: torch.Tensor) -> None:
        self.folder, self.path = folder, folder.folder / name
        self.numel, self.dtype = values.numel(), values.dtype
        self._incoming: tuple[int, torch.Tensor] | None = None
        self._failure: OSError | None = None
        self.write(0, values)

    def start(self) -> None:
        """Begin to read the slice; an error is kept for `take`."""
        if self._incoming is not None or not self.numel:
            return
        buffer = locked_tensor(self.numel, self.dtype)
        try:
            self._incoming = (self.folder.queue.submit_read(self.path, 0, buffer), buffer)
        except OSError as error:
            self._failure = error

    def take(self) -> torch.Tensor:
        """The slice, flat, in host memory; the caller owns it.

        Raises:
            OSError: it cannot be read.
        """
        self.start()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._incoming is None:
            return torch.empty(0, dtype=self.dtype, device="cpu")
        (ticket, buffer), self._incoming = self._incoming, None
        self.folder.queue.wait(ticket)
        return buffer

    def write(self, start: int, values: torch.Tensor) -> None:
        """Overwrite elements from `start`; returns when they are in the file."""
        if self._incoming is not None:
            (ticket, _), self._incoming = self._incoming, None
            self.folder.queue.wait(ticket)
        if values.numel():
            source = values.detach().to("cpu").contiguous()
            queue = self.folder.queue
            queue.wait(queue.submit_write(self.path, start * source.element_size(), source))


class SpilledStates:
    """Master weights and optimizer states of one flat parameter of the inner optimizer, in one file between steps.

    Args:
        folder: where the file lies.
        name: of the file.
        master: flat weights that the inner optimizer steps; their values go to the file at once.
    """

    def __init__(self, folder: SpillFolder, name: str, master: torch.nn.Parameter) -> None:
        self.folder, self.path, self.master = folder, folder.folder / name, master
        self.numel, self.dtype = master.numel(), master.dtype
        self._places: dict[str, tuple[int, torch.dtype]] = {}
        self._incoming: dict[str, tuple[int, torch.Tensor]] = {}
        self._outgoing: list[tuple[int, torch.Tensor]] = []
        self.resident = True
        self.flush({})
        self.settle({})

    def fetch(self) -> None:
        """Begin to read everything."""
        if self.resident or self._incoming:
            return
        for key, (offset, dtype) in self._places.items():
            buffer = self.folder.buffer(self.numel, dtype)
            self._incoming[key] = (self.folder.queue.submit_read(self.path, offset, buffer), buffer)

    def arrive(self, state: dict[str, Any]) -> None:
        """Wait for the reads; put the master's values and the states in place."""
        self.settle(state)
        self.fetch()
        for key, (ticket, buffer) in self._incoming.items():
            self.folder.queue.wait(ticket)
            if key == MASTER:
                self.master.data = buffer
            else:
                state[key] = buffer
        self._incoming.clear()
        self.resident = True

    def flush(self, state: Mapping[str, Any]) -> None:
        """Begin to write everything back."""
        offset = 0
        pieces = {
            MASTER: self.master.data,
            **{k: state[k] for k in sorted(state) if self._is_elementwise(state[k])},
        }
        for key, values in pieces.items():
            self._places[key] = (offset, values.dtype)
            self._outgoing.append(
                (self.folder.queue.submit_write(self.path, offset, values), values)
            )
            offset += -(-values.numel() * values.element_size() // _ALIGNMENT) * _ALIGNMENT

    def settle(self, state: dict[str, Any]) -> None:
        """Wait for the writes and let the memory go."""
        if not self._outgoing:
            return
        for ticket, values in self._outgoing:
            self.folder.queue.wait(ticket)
            self.folder.recycle(values)
        self._outgoing.clear()
        self.master.data = torch.empty(0, dtype=self.dtype, device="cpu")
        for key in self._places:
            if key != MASTER:
                state[key] = torch.empty(0, dtype=self._places[key][1], device="cpu")
        self.resident = False

    def _is_elementwise(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.dim() == 1
            and value.numel() == self.numel
            and self.numel > 1
        )


class SpilledGrad:
    """Gradients of one flat parameter of the inner optimizer, in a file from the backward pass to the step.

    Args:
        folder: where the file lies.
        name: of the file.
        numel: elements.
        dtype: in which they add up.

    Attributes:
        failure: the error of an earlier write; nothing that is read after it counts.
    """

    def __init__(self, folder: SpillFolder, name: str, numel: int, dtype: torch.dtype) -> None:
        self.folder, self.path = folder, folder.folder / name
        self.numel, self.dtype = numel, dtype
        self.failure: OSError | None = None
        self._squares: dict[int, torch.Tensor] = {}
        self._incoming: tuple[int, torch.Tensor] | None = None
        self._values: torch.Tensor | None = None
        with open(self.path, "wb") as file:
            file.truncate(numel * dtype.itemsize)  # padding is never written, and reads as zero

    @property
    def present(self) -> bool:
        """Whether there are gradients."""
        return bool(self._squares)

    def square(self) -> torch.Tensor:
        """The sum of the squares of all gradients, 0-dim float64."""
        return sum(self._squares.values(), torch.zeros((), dtype=torch.float64, device="cpu"))

    def store(self, start: int, values: torch.Tensor, fresh: bool) -> None:
        """Overwrite the gradients from `start`, or add to them; an error is kept for the step to raise.

        Args:
            start: first element.
            values: flat; not to be changed any more. A run of elements must always come in one piece.
            fresh: overwrite.
        """
        self.let_go()
        try:
            values = values.to(device="cpu", dtype=self.dtype).contiguous()
            if not fresh:
                self.finish_writes()
                before = self.folder.buffer(values.numel(), self.dtype)
                place = start * self.dtype.itemsize
                self.folder.queue.wait(self.folder.queue.submit_read(self.path, place, before))
                values = values + before
                self.folder.recycle(before)
            self._squares[start] = squared_norm(values)
            self._write(start, values)
        except OSError as error:
            self.failure = self.failure or error

    def clear(self, start: int, length: int) -> None:
        """Zero a run of elements."""
        self.store(start, torch.zeros(length, dtype=self.dtype, device="cpu"), fresh=True)

    def start(self) -> None:
        """Begin to read everything."""
        if self._incoming is None and self._values is None:
            self.finish_writes()
            buffer = self.folder.buffer(self.numel, self.dtype)
            self._incoming = (self.folder.queue.submit_read(self.path, 0, buffer), buffer)

    def values(self) -> torch.Tensor:
        """All gradients, flat, in host memory; `keep` after edits, `let_go` after use."""
        if self._values is None:
            self.start()
            assert self._incoming is not None
            (ticket, buffer), self._incoming = self._incoming, None
            self.folder.queue.wait(ticket)
            self._values = buffer
        return self._values

    def keep(self) -> None:
        """Write back what `values` gave, after edits of it."""
        values = self._values
        if values is None:
            return
        starts = sorted({0, *self._squares})
        for start, end in zip(starts, [*starts[1:], self.numel], strict=True):
            self._squares[start] = squared_norm(values[start:end])
        self._write(0, values)
        self.finish_writes()

    def let_go(self) -> None:
        """Have no gradients in memory."""
        if self._incoming is not None:
            (ticket, buffer), self._incoming = self._incoming, None
            self.folder.queue.wait(ticket)
            self._values = buffer
        if self._values is not None:
            self.folder.recycle(self._values)
            self._values = None

    def forget(self) -> None:
        """There are no gradients any more."""
        self.let_go()
        self._squares.clear()
        self.failure = None

    def _write(self, start: int, values: torch.Tensor) -> None:
        writing = self.folder.writing
        while len(writing) >= WRITES_BEHIND:
            owner, ticket = writing.popleft()
            owner._finish(ticket)
        place = start * self.dtype.itemsize
        writing.append((self, self.folder.queue.submit_write(self.path, place, values)))

    def finish_writes(self) -> None:
        """Wait until all gradients are in the file.

        Raises:
            OSError: a write failed, now or earlier.
        """
        mine = [ticket for owner, ticket in self.folder.writing if owner is self]
        others = [item for item in self.folder.writing if item[0] is not self]
        self.folder.writing = deque(others)
        for ticket in mine:
            self._finish(ticket)
        if self.failure is not None:
            raise self.failure

    def _finish(self, ticket: int) -> None:
        try:
            self.folder.queue.wait(ticket)
        except OSError as error:
            self.failure = self.failure or error


def stream(
    parts: Iterable[Any], states: Mapping[Any, dict[str, Any]], depth: int = 2
) -> Iterator[Any]:
    """Yield each part with its states in memory, while the next is read and the one before is written.

    Args:
        parts: objects with `.spilled` (a `SpilledStates`, or None for what is always in memory), `.spilled_grad` (a
            `SpilledGrad`, or None) and `.master`.
        states: the inner optimizer's, by master.
        depth: parts in memory at once.
    """
    waiting = list(parts)
    leaving: list[Any] = []
    for index, part in enumerate(waiting):
        for ahead in waiting[index : index + depth]:
            if ahead.spilled is not None:
                ahead.spilled.fetch()
            if ahead.spilled_grad is not None:
                ahead.spilled_grad.start()
        if part.spilled is None:
            yield part
            continue
        part.spilled.arrive(states[part.master])
        yield part
        if part.spilled_grad is not None:
            part.spilled_grad.let_go()
        part.spilled.flush(states[part.master])
        leaving.append(part)
        if len(leaving) >= depth:
            done = leaving.pop(0)
            done.spilled.settle(states[done.master])
    for part in leaving:
        part.spilled.settle(states[part.master])
