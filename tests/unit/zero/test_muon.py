# SPDX-License-Identifier: Apache-2.0
"""Muon's arithmetic against float64, its groups, and which rank owns which matrix."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero.layout import Layout
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam, matrix_update, muon_groups
from deepspeed.runtime.zero.muon.newton_schulz import orthogonalize
from deepspeed.runtime.zero.muon.original_muon import Muon, muon_update
from deepspeed.runtime.zero.whole_params import rounds


def by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """The same five steps on singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("method", ["gram", "standard"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (3, 7, 4), (1, 9)], ids=str)
def test_newton_schulz_maps_the_singular_values(method, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalize(matrix, method=method)
    assert found.shape == matrix.shape and found.dtype == torch.float32
    # Five steps of fp32 products; small singular values are lifted by up to 3.4^5.
    torch.testing.assert_close(found.double(), by_svd(matrix), atol=2e-4, rtol=0)
    exact = orthogonalize(matrix.double(), method=method)
    torch.testing.assert_close(exact, by_svd(matrix), atol=1e-9, rtol=0)


def test_no_direction_gives_no_update():
    assert orthogonalize(torch.zeros(4, 6)).eq(0).all()


def test_convolutions_count_as_matrices_and_tall_ones_are_scaled():
    torch.manual_seed(1)
    conv, tall = torch.randn(4, 3, 2, 2), torch.randn(32, 8)
    want = by_svd(conv.reshape(4, 12)).reshape(conv.shape)
    torch.testing.assert_close(matrix_update(conv).double(), want, atol=2e-4, rtol=0)
    torch.testing.assert_close(matrix_update(tall).double(), 2 * by_svd(tall), atol=4e-4, rtol=0)


def test_update_looks_ahead_by_one_step_of_the_momentum():
    torch.manual_seed(2)
    grad, momentum = torch.randn(5, 8), torch.randn(5, 8)
    moved = 0.9 * momentum.double() + 0.1 * grad.double()
    direction = 0.1 * grad.double() + 0.9 * moved
    kept = momentum.clone()
    update = muon_update(grad.clone(), kept, beta=0.9)
    torch.testing.assert_close(kept.double(), moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(update.double(), by_svd(direction), atol=2e-4, rtol=0)


def test_steps_of_both_rules_against_float64():
    torch.manual_seed(3)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    params = [torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())]
    twin = torch.nn.Parameter(bias.double().clone())
    adamw = torch.optim.AdamW([twin], lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    optimizer = MuonWithAuxAdam(
        [
            {"params": params[:1], "use_muon": True, "lr": 0.05, "weight_decay": 0.1},
            {"params": params[1:], "use_muon": False, "lr": 0.01, "weight_decay": 0.1},
        ]
    )
    want, momentum = weight.double(), torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(3):
        params[0].grad, params[1].grad = torch.randn(6, 4), torch.randn(6)
        twin.grad = params[1].grad.double()
        grad = params[0].grad.double()
        momentum = 0.95 * momentum + 0.05 * grad
        update = by_svd(0.05 * grad + 0.95 * momentum) * (6 / 4) ** 0.5
        want = want * (1 - 0.05 * 0.1) - 0.05 * update
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(params[0].detach().double(), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(params[1].detach().double(), twin.detach(), atol=1e-5, rtol=0)


def test_the_section_makes_two_groups_with_their_own_rates():
    model = torch.nn.ModuleDict(
        {"embed_tokens": torch.nn.Embedding(4, 3), "inner": torch.nn.Linear(3, 3)}
    )
    model["inner"].bias.requires_grad_(False)
    config = type("Config", (), {"optimizer_name": "muon"})
    deepspeed.set_optimizer_flags(config, model)
    options = {"lr": 0.1, "muon_lr": 0.3, "momentum": 0.8, "betas": (0.5, 0.6)}
    muon, adam = muon_groups(model.named_parameters(), options)
    assert muon["params"] == [model["inner"].weight] and adam["params"] == [
        model["embed_tokens"].weight
    ]
    assert (muon["lr"], muon["momentum"], muon["name"]) == (0.3, 0.8, "muon-params")
    assert (adam["lr"], adam["betas"], adam["name"]) == (0.1, (0.5, 0.6), "adam-params")
    group = {"params": list(model.parameters()), "lr": 0.7, "adam_lr": 0.9}
    muon, adam = muon_groups([group], options)
    assert (muon["lr"], adam["lr"]) == (0.7, 0.9), "a group's own rates win"
    with pytest.raises(ValueError, match="amsgrad"):
        muon_groups(model.parameters(), {"amsgrad": True})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3))]), "matrices"),
        (lambda: Muon([torch.nn.Parameter(torch.zeros(3, 3))], ns_method="qr"), "ns_method"),
        (lambda: MuonWithAuxAdam([{"params": []}]), "use_muon"),
        (lambda: MuonWithAuxAdam([{"params": [], "use_muon": True, "eps": 1}]), "eps"),
        (lambda: orthogonalize(torch.zeros(3)), "matrices"),
    ],
)
def test_what_muon_refuses(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("cut", [Layout.contiguous, Layout.per_param])
def test_each_matrix_has_one_owner_and_rounds_are_bounded(cut):
    shapes = [torch.Size(s) for s in ((8, 8), (4, 4), (16, 8), (2, 2), (8, 8), (4, 16), (8, 8))]
    found = list(rounds(cut([s.numel() for s in shapes], 3), shapes, most=50))
    assert sorted(p for one in found for p, _ in one) == list(range(len(shapes)))
    assert {owner for one in found for _, owner in one} == {0, 1, 2}
    assert all(sum(shapes[p].numel() for p, _ in one) <= 150 for one in found)


@pytest.mark.parametrize("stage", [1, 2])
def test_reduce_scatter_that_is_asked_for_is_refused_beside_offload(stage):
    zero = {"stage": stage, "reduce_scatter": True, "offload_optimizer": {"device": "cpu"}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Muon", "params": {"lr": 0.01}},
        "zero_optimization": zero,
    }
    with pytest.raises(ValueError, match="Muon with reduce scatter does not support optimizer off"):
        deepspeed.initialize(model=torch.nn.Linear(4, 4), config=config)
    del zero["reduce_scatter"]
    deepspeed.initialize(model=torch.nn.Linear(4, 4), config=config)
