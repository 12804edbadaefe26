# SPDX-License-Identifier: Apache-2.0
"""Buffers on large pages are buffers like any other."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops import pages


@pytest.mark.parametrize("numel", [0, 1, 1 << 20, (1 << 22) + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_holds_zeros_and_what_is_written(numel, dtype):
    buffer = pages.zeros(numel, dtype)
    assert buffer.shape == (numel,) and buffer.dtype == dtype and not buffer.any()
    buffer.fill_(2.0)
    assert (buffer == 2.0).all()


def test_a_system_that_gives_none_changes_nothing(monkeypatch):
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert pages.zeros(1 << 22, torch.float32).sum() == 0


def test_only_runs_of_large_pages_count(tmp_path):
    size = pages.mmap.PAGESIZE
    orders = (
        2 * 1024 * 1024 // size
    ).bit_length() - 1  # of the smallest run that holds a large page
    zone = ["7"] * orders + ["3", "1"]
    listing = tmp_path / "buddyinfo"
    listing.write_text(
        f"Node 0, zone   Normal {' '.join(zone)}\nNode 1, zone DMA {' '.join(zone)}\n",
        encoding="utf-8",
    )
    assert pages.free_large(str(listing)) == 2 * (3 + 2) * 2 * 1024 * 1024
    listing.write_text(f"Node 0, zone Normal {' x' * (orders + 1)}\n", encoding="utf-8")
    assert pages.free_large(str(listing)) is None
    assert pages.free_large(str(tmp_path / "nothing")) is None
