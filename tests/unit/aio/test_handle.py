# SPDX-License-Identifier: Apache-2.0
"""The legacy surface: AsyncIOBuilder, aio_handle, its module functions and its page-locked buffers."""

from __future__ import annotations

import gc

import pytest
import torch

from deepspeed.ops.aio import AsyncIOBuilder, GDSBuilder, locked_tensor

VALUES = {
    "block_size": 4096,
    "queue_depth": 3,
    "single_submit": True,
    "overlap_events": True,
    "intra_op_parallelism": 2,
}


@pytest.fixture(scope="module")
def op():
    return AsyncIOBuilder().load(verbose=False)


@pytest.fixture(params=[{}, VALUES])
def handle(op, request):
    return op.aio_handle(**request.param)


def test_the_builder_says_yes_and_gds_says_why_not():
    assert AsyncIOBuilder.NAME == "async_io" and AsyncIOBuilder().is_compatible()
    assert not GDSBuilder().is_compatible()
    with pytest.raises(RuntimeError, match="GPUDirect Storage is not supported"):
        GDSBuilder().load(verbose=False)


def test_values_are_kept_and_defaults_are_upstreams(op):
    given = op.aio_handle(*VALUES.values())
    assert {name: getattr(given, f"get_{name}")() for name in VALUES} == VALUES
    assert given.get_alignment() == 1024
    default = op.aio_handle()
    assert [getattr(default, f"get_{name}")() for name in VALUES] == [1 << 20, 128, False, False, 1]
    assert default.get_alignment() == 512


@pytest.mark.parametrize("validate", [False, True])
def test_results_are_upstreams(handle, folder, validate):
    path = str(folder / "handle.bin")
    sent = torch.arange(10_001, dtype=torch.int32)
    assert handle.wait() == 0
    assert handle.write(sent, path, validate) == 0
    assert handle.sync_pwrite(sent, path, 8) == 1
    assert handle.pwrite(sent, path, validate, False, 4) == 1
    assert handle.pwrite(sent, path, validate, True) == 0
    assert handle.wait() == 1
    assert handle.async_pwrite(sent + 1, path, 1 << 17) == 0
    assert handle.async_pwrite(sent + 2, path, file_offset=1 << 18) == 0
    assert handle.wait() == 2
    rooms = [torch.zeros_like(sent) for _ in range(5)]
    assert handle.read(rooms[0], path, validate) == 0
    assert handle.sync_pread(rooms[1], path, 0) == 1
    assert handle.pread(rooms[2], path, validate, False, 1 << 17) == 1
    assert handle.pread(rooms[3], path, validate, True, 1 << 18) == 0
    assert handle.async_pread(rooms[4], path, 0) == 0
    assert handle.wait() == 2 and handle.wait() == 0
    for room, shift in zip(rooms, (0, 0, 1, 2, 0), strict=True):
        assert torch.equal(room, sent + shift)


def test_a_write_goes_to_an_open_descriptor_by_its_name(handle, folder):
    path = folder / "open.bin"
    sent = torch.arange(1000, dtype=torch.int16)
    with path.open("wb") as file:
        assert handle.async_pwrite(buffer=sent, fd=file.fileno(), file_offset=6) == 0
        assert handle.wait() == 1
    assert torch.equal(torch.frombuffer(bytearray(path.read_bytes()[6:]), dtype=torch.int16), sent)
    with pytest.raises(TypeError, match="one of filename and fd"):
        handle.async_pwrite(sent)


def test_a_request_begun_may_fail_at_wait(handle, folder):
    handle.async_pread(torch.zeros(5), str(folder / "missing.bin"))
    with pytest.raises(FileNotFoundError, match="reading 20 bytes at offset 0"):
        handle.wait()
    assert handle.wait() == 0


def test_validation_sees_a_difference(op, folder, monkeypatch):
    path = folder / "v.bin"
    handle = op.aio_handle()
    handle.write(torch.zeros(100), path, True)
    begin = handle.async_pread

    def other(buffer, *rest):
        begin(buffer, *rest)
        handle._queue.wait_all()
        buffer[50] = 1

    room = torch.zeros(100)
    other(room, path)
    with pytest.raises(OSError, match="memory and file differ"):
        op._compare(room, path, 0)


def test_module_functions(op, folder):
    path, sent, room = str(folder / "m.bin"), torch.randn(1000), torch.zeros(1000)
    assert op.aio_write(sent, path, 4096, 4, False, False, True) == 0
    assert op.aio_read(room, path, 4096, 4, True, True, True) == 0
    assert torch.equal(room, sent)
    target = torch.zeros(4000, dtype=torch.uint8)
    op.deepspeed_memcpy(target, sent)
    assert torch.equal(target.view(torch.float32), sent)
    with pytest.raises(ValueError, match="got 4000, expected 12"):
        op.deepspeed_memcpy(torch.zeros(3), sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_locked_buffers(handle, folder, dtype):
    buffer = handle.new_cpu_locked_tensor(4096, torch.empty(0, dtype=dtype))
    assert buffer.shape == (4096,) and buffer.dtype == dtype and buffer.device.type == "cpu"
    assert buffer.data_ptr() % 4096 == 0
    other = torch.zeros(4096, dtype=dtype)
    assert not handle.is_pinned(other)
    buffer.copy_(torch.arange(4096) % 100)
    handle.write(buffer, str(folder / "b.bin"))
    handle.read(other, str(folder / "b.bin"))
    assert torch.equal(buffer, other)
    assert handle.free_cpu_locked_tensor(buffer) == (not torch.cuda.is_available())
    assert not handle.free_cpu_locked_tensor(other)
    assert torch.equal(buffer, other)  # memory goes with its last tensor, not before


def test_a_buffer_lives_as_long_as_any_view():
    views = [locked_tensor(1 << 18, torch.float32).fill_(i)[10:20] for i in range(20)]
    gc.collect()
    assert [float(view.sum()) for view in views] == [10.0 * i for i in range(20)]
    assert locked_tensor(0, torch.float32).numel() == 0
    with pytest.raises(ValueError, match="-1"):
        locked_tensor(-1, torch.float32)
