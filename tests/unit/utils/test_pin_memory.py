# SPDX-License-Identifier: Apache-2.0
"""Page-locked memory of the native library: lifetimes, views, the choice of the backend, and the count of it."""

from __future__ import annotations

import gc
import logging

import pytest
import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.aio import buffers
from deepspeed.ops.op_builder import PinMemoryBuilder
from deepspeed.utils import pin_memory_tracker
from deepspeed.utils.logging import logger
from deepspeed.utils.pin_memory import NativePinnedMemory, get_active_native_pinned_memory

needs_library = pytest.mark.skipif(not buffers.can_lock(), reason="no native library here")


@needs_library
def test_a_view_keeps_pinned_memory_and_the_last_one_frees_it():
    pins = NativePinnedMemory()
    source = torch.arange(12.0).view(3, 4)
    pinned = pins.pin(source)
    assert torch.equal(pinned, source) and pinned.ds_pinned
    view, begin = pinned[1], pinned.data_ptr()
    assert pins.is_pinned(view) and not pins.is_pinned(source)
    del pinned
    gc.collect()
    assert begin in pins._ranges and view.tolist() == [4.0, 5.0, 6.0, 7.0]
    del view
    gc.collect()
    assert not pins._ranges


@needs_library
def test_unpinning_means_the_memory_pinned_first_and_leaves_others_valid():
    pins = NativePinnedMemory()
    pinned = pins.pin(torch.ones(8), make_copy=False, match_shape=False)
    view = pinned[2:]
    view.fill_(3)
    pinned.data = torch.zeros(8)
    assert pins.unpin(pinned) and not pins.is_pinned(view)
    assert view.tolist() == [3.0] * 6
    assert not pins.unpin(pinned) and not pins.unpin(torch.ones(2))
    assert not pins.is_pinned(torch.empty(2, device="meta"))


@needs_library
def test_the_accelerator_pins_by_the_backend_that_is_chosen(monkeypatch):
    accelerator = get_accelerator()
    monkeypatch.delenv("DS_PIN_MEMORY_BACKEND", raising=False)
    assert get_active_native_pinned_memory() is None
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    pinned = accelerator.pin_memory(torch.ones(2, 3))
    assert pinned.shape == (2, 3) and accelerator.is_pinned(pinned[1])
    assert accelerator.unpin_memory(pinned) is True and accelerator.unpin_memory(pinned) is False
    assert not get_active_native_pinned_memory().is_pinned(pinned)
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "cuda")
    with pytest.raises(ValueError, match="torch or native"):
        accelerator.pin_memory(torch.ones(2))


@needs_library
def test_the_legacy_handle_frees_by_tensor_and_by_address():
    handle = PinMemoryBuilder().load().pin_handle()
    for free in (
        handle.free_cpu_locked_tensor,
        lambda tensor: handle.free_cpu_locked_tensor_by_ptr(tensor.data_ptr()),
    ):
        buffer = handle.new_cpu_locked_tensor(4096, torch.empty(0))
        if not handle.is_pinned(buffer):
            pytest.skip("the system lets no memory be locked")
        assert free(buffer) is True and not handle.is_pinned(buffer) and free(buffer) is False


def test_each_doubling_of_pinned_memory_is_told_once(caplog, monkeypatch):
    tracker = pin_memory_tracker._Tracker()
    monkeypatch.setattr(pin_memory_tracker, "_tracker", tracker)
    with caplog.at_level(logging.INFO, logger=logger.name):
        for gigabytes in (31, 2, 1, 100):
            pin_memory_tracker.track_pinned_memory(gigabytes << 30)
        pin_memory_tracker.pinned_memory_summary("now")
    told = [record.message for record in caplog.records]
    assert len(told) == 3
    assert "32.00 GB" in told[0] and "128.00 GB" in told[1]
    assert told[2] == "now: page-locked memory: 134.00 GB in 4 allocations"
    assert pin_memory_tracker._fmt_bytes(1536) == "1.5 KB"
