# SPDX-License-Identifier: Apache-2.0
"""Blocks of memory are used again when, and only when, nothing refers to them."""

from __future__ import annotations

import pytest
import torch

from deepspeed.runtime.zero.blocks import Blocks

CPU = torch.device("cpu")
MB = 1 << 20


def test_a_dropped_block_is_used_again_in_any_dtype():
    blocks = Blocks()
    first = blocks.take(MB, torch.float32, CPU)
    place = first.data_ptr()
    del first
    second = blocks.take(2 * MB, torch.bfloat16, CPU)
    assert second.data_ptr() == place
    assert second.shape == (2 * MB,) and second.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t,
        lambda t: t[5:10].view(torch.int32),
        lambda t: t.numpy(),
        lambda t: torch.nn.Parameter(t[: MB // 2].view(2, -1)),
        lambda t: (t.requires_grad_() * t.detach()[:1]).sum(),
        lambda t: t.untyped_storage(),
    ],
    ids=["tensor", "view", "numpy", "parameter", "graph", "storage"],
)
def test_who_keeps_a_reference_keeps_the_values(keep):
    blocks = Blocks()
    first = blocks.take(MB, torch.float32, CPU)
    place = first.data_ptr()
    kept = keep(first)
    is_storage = isinstance(kept, torch.UntypedStorage)
    del first
    second = blocks.take(MB, torch.float32, CPU)
    # Python has one object for a storage; the list's own is no other user.
    assert (second.data_ptr() == place) is is_storage
    assert kept is not None


def test_idle_blocks_add_little_to_the_fullest_moment():
    blocks = Blocks()
    for size in (40, 1, 40, 2, 30, 1):
        taken = blocks.take(size * MB, torch.uint8, CPU)
        held = sum(block.nbytes() for block in blocks._blocks)
        assert held <= (40 + 16) * MB
        del taken


def test_a_small_request_does_not_take_a_large_block():
    blocks = Blocks()
    large = blocks.take(8 * MB, torch.uint8, CPU)
    place = large.data_ptr()
    del large
    assert blocks.take(2 * MB, torch.uint8, CPU).data_ptr() != place
    assert blocks.take(5 * MB, torch.uint8, CPU).data_ptr() == place


def test_cleared_blocks_stay_with_their_users():
    blocks = Blocks()
    kept = blocks.take(MB, torch.uint8, CPU).fill_(7)
    blocks.clear()
    other = blocks.take(MB, torch.uint8, CPU).fill_(1)
    assert bool((kept == 7).all()) and other.data_ptr() != kept.data_ptr()
