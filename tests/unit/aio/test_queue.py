# SPDX-License-Identifier: Apache-2.0
"""FileQueue on every backend: byte for byte against Python's own files, alone and many at a time."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed.ops.aio import FileQueue, Options, backends


def noise(nbytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


sizes = st.one_of(st.integers(0, 70_000), st.sampled_from([511, 512, 4095, 4096, 4097, 65536]))
offsets = st.one_of(st.integers(0, 20_000), st.sampled_from([0, 512, 4096, 8191, 8192]))
options = st.builds(
    Options,
    block_size=st.sampled_from([512, 1000, 4096, 6144, 16384, 1 << 20]),
    queue_depth=st.sampled_from([1, 2, 7, 64]),
    single_submit=st.booleans(),
    overlap_events=st.booleans(),
    intra_op_parallelism=st.sampled_from([1, 3]),
    direct=st.booleans(),
)


@pytest.mark.parametrize("backend", backends())
@settings(max_examples=25, deadline=None)
@given(options=options, nbytes=sizes, offset=offsets, shift=st.integers(0, 65), old=sizes)
def test_bytes_go_where_they_belong(backend, options, nbytes, offset, shift, old):
    with (
        tempfile.TemporaryDirectory() as folder,
        FileQueue(options, backend) as queue,
    ):
        path = Path(folder) / "bytes.bin"
        before = noise(old, 1).numpy().tobytes()
        path.write_bytes(before)
        sent = noise(nbytes + shift)[shift:]
        assert queue.wait(queue.submit_write(path, offset, sent)) == nbytes
        wanted = bytearray(before.ljust(offset if nbytes else 0, b"\0"))
        wanted[offset : offset + nbytes] = sent.numpy().tobytes()
        assert path.read_bytes() == bytes(wanted)
        # bytes around the place that is read into must stay
        room = torch.full((nbytes + shift + 64,), 9, dtype=torch.uint8)
        assert queue.wait(queue.submit_read(path, offset, room[shift : shift + nbytes])) == nbytes
        assert torch.equal(room[shift : shift + nbytes], sent)
        assert (room[:shift] == 9).all() and (room[shift + nbytes :] == 9).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_any_dtype_and_shape(queue, folder, dtype):
    sent = noise(3 * 1001 * 5).reshape(3, 1001, 5).to(dtype)
    queue.wait(queue.submit_write(folder / "a b.bin", 0, sent))
    got = torch.empty_like(sent)
    queue.wait(queue.submit_read(folder / "a b.bin", 0, got))
    assert torch.equal(got, sent)


def test_many_requests_at_once_in_one_file(queue, folder):
    path = folder / "many.bin"
    pieces = [noise(5000 + i, i) for i in range(300)]
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.numel())
    for piece, start in zip(pieces, starts, strict=False):
        queue.submit_write(path, start, piece)
    assert queue.wait_all() == 300
    assert path.read_bytes() == torch.cat(pieces).numpy().tobytes()
    got = [torch.empty_like(piece) for piece in pieces]
    tickets = [
        queue.submit_read(str(path), start, room) for room, start in zip(got, starts, strict=False)
    ]
    for ticket in reversed(tickets):
        queue.wait(ticket)
    assert all(map(torch.equal, got, pieces))
    assert queue.wait_all() == 0


def test_a_thousand_files(queue, folder):
    for i in range(1000):
        queue.submit_write(folder / f"{i}", 0, torch.full((3,), i))
    assert queue.wait_all() == 1000
    got = torch.zeros(1000, 3, dtype=torch.int64)
    for i in range(1000):
        queue.submit_read(folder / f"{i}", 0, got[i])
    queue.wait_all()
    assert torch.equal(got, torch.arange(1000)[:, None].expand(1000, 3))


def test_two_queues_and_threads_do_not_mix(backend, folder):
    def work(number):
        path = folder / f"{number % 2}-{number}.bin"
        sent = noise(50_000, number)
        for _ in range(5):
            queue = queues[number % 2]
            queue.wait(queue.submit_write(path, 0, sent))
            got = torch.empty_like(sent)
            queue.wait(queue.submit_read(path, 0, got))
            results.append(torch.equal(got, sent))

    results = []
    queues = [FileQueue(Options(8192, 3), backend) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for queue in queues:
        queue.close()
    assert results == [True] * 30


def test_memory_lives_until_its_request_is_over(queue, folder):
    tensor = noise(1 << 20)
    wanted = tensor.numpy().tobytes()
    alive = weakref.ref(tensor)
    view = tensor[:]
    ticket = queue.submit_write(folder / "kept.bin", 0, view)
    del tensor, view
    gc.collect()
    queue.wait(ticket)
    assert (folder / "kept.bin").read_bytes() == wanted
    gc.collect()
    assert alive() is None


def test_closing_with_requests_under_way_leaves_memory_alone(backend, folder):
    queue = FileQueue(Options(4096, 2), backend)
    path = folder / "large.bin"
    path.write_bytes(bytes(8 << 20))
    rooms = [torch.full((1 << 20,), 5, dtype=torch.uint8) for _ in range(64)]
    for i, room in enumerate(rooms):
        queue.submit_read(path, (i % 8) << 20, room)
    queue.close()
    for room in rooms:
        room.fill_(7)
    assert all((room == 7).all() for room in rooms)
    with pytest.raises(ValueError, match="closed"):
        queue.submit_read(path, 0, rooms[0])
    queue.close()


def test_a_dropped_queue_ends_its_requests(backend, folder):
    queue = FileQueue(Options(4096, 2), backend)
    queue.submit_write(folder / "dropped.bin", 0, noise(4 << 20))
    before = threading.active_count()
    del queue
    gc.collect()
    assert threading.active_count() <= before


def test_a_descriptor_does_for_a_path(queue, folder):
    path = folder / "by descriptor.bin"
    sent = noise(10_001)
    with open(path, "w+b") as file:
        queue.submit_write(file.fileno(), 100, sent)
        queue.submit_write(file.fileno(), 0, noise(100, 3))
    assert queue.wait_all() == 2  # the queue has descriptors of its own
    assert path.read_bytes() == (torch.cat([noise(100, 3), sent])).numpy().tobytes()
    with open(path, "rb") as file:
        got = torch.empty_like(sent)
        queue.wait(queue.submit_read(file.fileno(), 100, got))
    assert torch.equal(got, sent)


def test_offsets_beyond_four_gigabytes(queue, folder):
    path = folder / "sparse.bin"
    at = (5 << 30) + 77
    with open(path, "wb") as file:
        file.truncate(at + 10)  # so that no space is reserved before the place
    queue.wait(queue.submit_write(path, at, noise(10)))
    got = torch.zeros(10, dtype=torch.uint8)
    queue.wait(queue.submit_read(path, at, got))
    assert torch.equal(got, noise(10))
    assert path.stat().st_size == at + 10


@pytest.mark.parametrize(
    ("tensor", "error"),
    [
        (torch.zeros(4, 4).t()[:, 1], ValueError),
        (torch.zeros(4, 4)[:, 1], ValueError),
        (torch.zeros(1).expand(5), ValueError),
        (torch.zeros(3, device="meta"), TypeError),
        (torch.zeros(3).to_sparse(), TypeError),
        ([1, 2], TypeError),
    ],
)
def test_memory_that_is_no_row_of_bytes_is_refused(queue, folder, tensor, error):
    if isinstance(tensor, torch.Tensor) and tensor.is_contiguous() and tensor.dim() == 1:
        tensor = torch.zeros(4, 4)[:, 2] if error is ValueError else tensor
    for submit in (queue.submit_read, queue.submit_write):
        with pytest.raises(error):
            submit(folder / "refused.bin", 0, tensor)
    assert not (folder / "refused.bin").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"block_size": 0},
        {"block_size": 511},
        {"block_size": 1 << 31},
        {"queue_depth": 0},
        {"queue_depth": 5000},
        {"intra_op_parallelism": 0},
        {"intra_op_parallelism": 1000},
    ],
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FileQueue(Options(**bad))


def test_a_backend_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match=r"got tape, expected .*python"):
        FileQueue(backend="tape")


def test_the_variable_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("DS_AIO_BACKEND", "threads" if "threads" in backends() else "python")
    with FileQueue() as queue:
        assert queue.backend == os.environ["DS_AIO_BACKEND"]


def test_a_plain_queue_that_the_garbage_collector_ends_waits_for_nobody(tmp_path):
    """It may run where threads are being started, and joining one there hangs for good."""
    begun, go = threading.Event(), threading.Event()
    queue = FileQueue(backend="python")
    plain = queue._queue
    serve = plain._serve

    def slowly(request):
        begun.set()
        go.wait(10)
        return serve(request)

    plain._serve = slowly
    queue.submit_write(tmp_path / "file", 0, torch.ones(4))
    assert begun.wait(10)
    finalizer = queue._finalizer
    del queue, plain
    gc.collect()
    finalizer()  # returns while the request is still under way
    go.set()
