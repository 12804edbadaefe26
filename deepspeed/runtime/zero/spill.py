# SPDX-License-Identifier: Apache-2.0
"""State that lives in files between uses (ZeRO-Infinity, arXiv:2104.07857): slices of parameters, and of states.

Reads and writes run beside the caller. An error of the disk is raised where the result is needed, with the file, the
place and the cause in it.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deepspeed.ops.aio.buffers import locked_tensor
from deepspeed.ops.aio.library import Options
from deepspeed.ops.aio.queue import FileQueue
from deepspeed.utils.errors import explain

# Files are laid out so that every piece can go to the device without a copy.
_ALIGNMENT = 4096
MASTER = "master"


class SpillFolder:
    """A folder of one rank for files that do not outlive the run.

    Args:
        folder: made anew; what was in it is removed.
        options: block size, depth and the like of the file queue.

    Raises:
        OSError: if the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, options: Options | None = None) -> None:
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
        self.queue = FileQueue(options)
        self._idle: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._names = itertools.count()

    def new_name(self) -> str:
        """A file name that no other state of this folder has."""
        return f"{next(self._names)}.tensor.swp"

    def buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat buffer for file I/O, its contents undefined; give it back with `recycle`."""
        idle = self._idle.get((numel, dtype))
        return idle.pop() if idle else locked_tensor(numel, dtype)

    def recycle(self, buffer: torch.Tensor) -> None:
        """Keep a buffer for the next one of its size."""
        self._idle.setdefault((buffer.numel(), buffer.dtype), []).append(buffer)

    def close(self) -> None:
        """Stop reading and writing, and remove the files."""
        self.queue.close()
        shutil.rmtree(self.folder, ignore_errors=True)


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
        self.write(0, values)

    def start(self) -> None:
        """Begin to read the slice."""
        if self._incoming is None and self.numel:
            buffer = self.folder.buffer(self.numel, self.dtype)
            self._incoming = (self.folder.queue.submit_read(self.path, 0, buffer), buffer)

    def take(self) -> torch.Tensor:
        """The slice, flat, in host memory; the caller owns it."""
        self.start()
        if self._incoming is None:
            return torch.empty(0, dtype=self.dtype)
        (ticket, buffer), self._incoming = self._incoming, None
        self.folder.queue.wait(ticket)
        return buffer

    def write(self, start: int, values: torch.Tensor) -> None:
        """Overwrite elements from `start`; returns when they are in the file."""
        self._incoming = None if self._incoming is None else self._drop_incoming()
        if values.numel():
            source = values.detach().to("cpu").contiguous()
            queue = self.folder.queue
            queue.wait(queue.submit_write(self.path, start * source.element_size(), source))

    def _drop_incoming(self) -> None:
        assert self._incoming is not None
        ticket, buffer = self._incoming
        self.folder.queue.wait(ticket)
        self.folder.recycle(buffer)


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
        self.master.data = torch.empty(0, dtype=self.dtype)
        for key in self._places:
            if key != MASTER:
                state[key] = torch.empty(0, dtype=self._places[key][1])
        self.resident = False

    def _is_elementwise(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.dim() == 1
            and value.numel() == self.numel
            and self.numel > 1
        )


def stream(
    parts: Iterable[Any], states: Mapping[Any, dict[str, Any]], depth: int = 2
) -> Iterator[Any]:
    """Yield each part with its states in memory, while the next is read and the one before is written.

    Args:
        parts: objects with `.spilled` (a `SpilledStates`, or None for what is always in memory) and `.master`.
        states: the inner optimizer's, by master.
        depth: parts in memory at once.
    """
    waiting = list(parts)
    leaving: list[Any] = []
    for index, part in enumerate(waiting):
        for ahead in waiting[index : index + depth]:
            if ahead.spilled is not None:
                ahead.spilled.fetch()
        if part.spilled is None:
            yield part
            continue
        part.spilled.arrive(states[part.master])
        yield part
        part.spilled.flush(states[part.master])
        leaving.append(part)
        if len(leaving) >= depth:
            done = leaving.pop(0)
            done.spilled.settle(states[done.master])
    for part in leaving:
        part.spilled.settle(states[part.master])
