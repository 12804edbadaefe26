# SPDX-License-Identifier: Apache-2.0
"""Domino: a transformer in two halves of a batch over tensor-parallel ranks, and what runs beside what."""

from __future__ import annotations

import pytest
import torch

from deepspeed.runtime.domino.transformer import (
    DominoTransformer,
    DominoTransformerLayer,
    LayerType,
)
from tests.helpers.domino import check, config, make, order_of_events


def on_ranks(rank):
    group = torch.distributed.new_group([0, 1])
    check(rank, 2, group)
    check(rank, 2, group, gated_linear_unit=True, apply_residual_connection_post_layernorm=True)
    under_autocast(group)
    return order_of_events(rank, group)


def under_autocast(group):
    model = make(group, params_dtype=torch.float32)
    torch.manual_seed(7)
    x = torch.randn(5, 2, 8, requires_grad=True)
    wanted = [x, *model.parameters()]
    found = []
    for casts in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            output = model(x, None)
        found.append(torch.autograd.grad(output.square().sum(), wanted))
    for narrow, wide in zip(*found, strict=True):  # bf16 has 8 bits, and a dozen roundings add up
        assert narrow.dtype is torch.float32
        assert (narrow - wide).norm() < 0.05 * wide.norm()


def test_two_ranks_compute_what_one_does_and_sums_run_beside_the_other_half(ranks2):
    for forward, backward in ranks2.run(on_ranks):
        # column, row, sum starts: of both halves, before the first sum is waited for
        assert forward == "ppsppsww" * 2
        # of MLP and attention: the gradients of both halves start before the first is waited for
        assert backward == "ssww" * 2


def on_one_rank(rank):
    if rank == 0:
        group = torch.distributed.new_group([0], use_local_synchronization=True)
        check(0, 1, group)
        model = make(group)
        with pytest.raises(ValueError, match="two halves"):
            model(torch.zeros(4, 1, 8, dtype=torch.float64), None)
        model.set_input_tensor(torch.zeros(4, 2, 8, dtype=torch.float64))
        with pytest.raises(NotImplementedError, match="encoder's"):
            DominoTransformerLayer(config(), None, None, 1, LayerType.decoder)
        with pytest.raises(NotImplementedError, match="decoder together"):
            DominoTransformer(config(), None, None, None)


def test_one_rank_and_what_is_refused(ranks2):
    ranks2.run(on_one_rank)
