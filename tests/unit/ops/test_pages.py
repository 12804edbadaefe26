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
