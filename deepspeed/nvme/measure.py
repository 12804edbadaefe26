# SPDX-License-Identifier: Apache-2.0
"""One measurement of a disk: write or read a file a few times by one engine, and time each loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepspeed.ops.aio.async_io_op import aio_handle, aio_read, aio_write
from deepspeed.utils.errors import explain

ENGINES = ("aio_handle", "aio_basic", "torch_io", "torch_fastio")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        folder: where its file lies.
        nbytes: size of the file.
        read: read it (it is written first), or write it.
        device: of the tensor that is moved.
        pin_by_accelerator: page-lock by the accelerator, not by the I/O library.
        requests: into how many requests a file is cut, all under way at once.
    """

    folder: Path
    nbytes: int
    read: bool
    engine: str = "aio_handle"
    block_size: int = 1 << 20
    queue_depth: int = 32
    single_submit: bool = False
    overlap_events: bool = True
    intra_op_parallelism: int = 1
    loops: int = 3
    warmup: int = 1
    validate: bool = False
    new_file_each_loop: bool = False
    device: str = "cpu"
    pin_by_accelerator: bool = False
    requests: int = 1
    legacy_save: bool = False
    fast_size: int = 64 << 20
    name: str = "ds_io"


def size_of(text: str) -> int:
    """Return the bytes of "4096", "64M", "1G" and the like.

    Raises:
        ValueError: that is no positive size.
    """
    word = str(text).strip().upper().removesuffix("B")
    number, unit = (word[:-1], word[-1]) if word[-1:] in "KMGT" and word else (word, "")
    if not number.isdigit() or int(number) == 0:
        raise ValueError(explain("not a size", got=text, expected="a number with K, M or G"))
    return int(number) * _UNITS[unit]


def measure(job: Job, ready: Callable[[], object] = lambda: None) -> list[float]:
    """Run a job; returns the seconds of each loop, the first `job.warmup` ones included.

    Args:
        job: what to do. Its files are removed at the end.
        ready: called before each loop, e.g. to wait for other processes.

    Raises:
        OSError: the disk fails or is full.
    """
    loops = job.warmup + job.loops
    count = loops if job.new_file_each_loop else 1
    paths = [job.folder / f"{job.name}_{os.getpid()}_{i}.bin" for i in range(count)]
    move, prepare = _mover(job)
    seconds = []
    try:
        if job.read:
            for path in paths:
                prepare(path)
        for i in range(loops):
            ready()
            start = time.perf_counter()
            move(paths[i % count])
            seconds.append(time.perf_counter() - start)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    return seconds


def _mover(job: Job) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """Return the function to time, and the one that makes a file to read."""
    if job.engine in ("torch_io", "torch_fastio"):
        return _torch_mover(job)
    handle = aio_handle(
        job.block_size,
        job.queue_depth,
        job.single_submit,
        job.overlap_events,
        job.intra_op_parallelism,
    )
    buffer = _buffer(job, handle)
    if job.engine == "aio_basic":
        settings = (job.block_size, job.queue_depth, job.single_submit, job.overlap_events)
        basic = aio_read if job.read else aio_write
        return (
            lambda path: (basic(buffer, str(path), *settings, job.validate), None)[1],
            lambda path: (handle.write(buffer, str(path)), None)[1],
        )

    def move(path: Path) -> None:
        at = 0
        begin = handle.pread if job.read else handle.pwrite
        for piece in buffer.chunk(job.requests):
            begin(piece, str(path), job.validate, True, at)
            at += piece.numel()
        handle.wait()

    return move, lambda path: (handle.write(buffer, str(path)), None)[1]


def _torch_mover(job: Job) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    tensor = torch.randint(0, 256, (job.nbytes,), dtype=torch.uint8, device=job.device)
    legacy = job.legacy_save

    def save(path: Path) -> None:
        if job.engine == "torch_io":
            torch.save(tensor, path, _use_new_zipfile_serialization=not legacy)
            return
        from deepspeed.io import FastFileWriter, FastFileWriterConfig

        handle = aio_handle(job.block_size, job.queue_depth, False, True, job.intra_op_parallelism)
        pinned = handle.new_cpu_locked_tensor(
            job.fast_size, torch.empty(0, dtype=torch.uint8, device="cpu")
        )
        writer = FastFileWriter(str(path), FastFileWriterConfig(handle, pinned))
        torch.save(tensor, writer, _use_new_zipfile_serialization=not legacy)
        writer.close()

    def load(path: Path) -> None:
        torch.load(path, map_location=job.device, weights_only=True)

    return (load if job.read else save), save


def _buffer(job: Job, handle: aio_handle) -> Tensor:
    example = torch.empty(0, dtype=torch.uint8, device="cpu")
    if job.device != "cpu":
        buffer = torch.empty(job.nbytes, dtype=torch.uint8, device=job.device)
    elif job.pin_by_accelerator and torch.cuda.is_available():
        buffer = torch.empty(job.nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")
    else:
        buffer = handle.new_cpu_locked_tensor(job.nbytes, example)
    # Random bytes: some disks are faster for zeros.
    return buffer.random_(0, 256)
