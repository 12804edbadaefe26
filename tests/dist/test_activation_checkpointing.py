# SPDX-License-Identifier: Apache-2.0
"""Saved inputs cut over two model-parallel ranks: half the memory, the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepspeed.runtime.activation_checkpointing import checkpointing


class Mpu:
    get_model_parallel_rank = staticmethod(dist.get_rank)
    get_model_parallel_world_size = staticmethod(dist.get_world_size)

    @staticmethod
    def get_model_parallel_group():
        return dist.group.WORLD


def train(call, shape):
    torch.manual_seed(5)
    blocks = nn.ModuleList(
        [nn.Sequential(nn.Linear(shape[-1], shape[-1]), nn.Dropout(0.3)) for _ in range(2)]
    )
    x = torch.randn(shape, requires_grad=True)
    mask = torch.rand(shape) > 0.2
    y = x
    for block in blocks:
        y = call(lambda t, m, b=block: b(t) * m, y, mask)
    y.square().sum().backward()
    return x.grad, [p.grad for p in blocks.parameters()]


def cut_inputs(rank, shape, contiguous, reentrant):
    checkpointing.configure(
        Mpu(), partition_activations=True, contiguous_checkpointing=contiguous, num_checkpoints=2
    )
    sizes = []
    place = checkpointing.Kept.__init__

    def watched(self, tensor, policy, position):
        place(self, tensor, policy, position)
        sizes.append((tensor.numel(), self.values.numel(), tensor.dtype))

    checkpointing.Kept.__init__ = watched
    try:
        call = checkpointing.checkpoint if reentrant else checkpointing.non_reentrant_checkpoint
        got = train(call, shape)
    finally:
        checkpointing.Kept.__init__ = place
        checkpointing.configure(None)
    want = train(lambda function, *args: function(*args), shape)
    return got, want, sizes


@pytest.mark.parametrize("shape", [(4, 6), (3, 5)])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_cut_inputs_give_the_gradients_of_plain_execution(ranks2, shape, contiguous, reentrant):
    for got, want, sizes in ranks2.run(cut_inputs, shape, contiguous, reentrant):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        floats = [(whole, kept) for whole, kept, dtype in sizes if dtype == torch.float32]
        masks = [(whole, kept) for whole, kept, dtype in sizes if dtype == torch.bool]
        assert len(floats) == 2 and all(kept == -(-whole // 2) for whole, kept in floats)
        assert len(masks) == 2 and all(kept == whole for whole, kept in masks)
