# SPDX-License-Identifier: Apache-2.0
"""The layer of BERT's encoder gives what its formulas say, forward and backward, and can be trained by the engine."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepspeed
from deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 12, 3


def make(**options: Any) -> DeepSpeedTransformerLayer:
    torch.manual_seed(0)
    layer = DeepSpeedTransformerLayer(
        DeepSpeedTransformerConfig(
            hidden_size=WIDTH,
            intermediate_size=20,
            heads=HEADS,
            num_hidden_layers=2,
            initializer_range=0.3,
            **options,
        )
    )
    with torch.no_grad():
        for param in layer.parameters():  # norms and biases that do something
            param.add_(0.1 * torch.randn_like(param))
    return layer


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() * scale + shift


def by_formula(p: dict[str, Tensor], x: Tensor, mask: Tensor, pre: bool) -> Tensor:
    def attention(x: Tensor) -> Tensor:
        parts = (x @ p["attn_qkvw"].T + p["attn_qkvb"]).chunk(3, -1)
        q, k, v = (part.view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for part in parts)
        weights = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + mask).softmax(-1)
        seen = (weights @ v).transpose(1, 2).reshape(BATCH, TOKENS, WIDTH)
        return seen @ p["attn_ow"].T + p["attn_ob"]

    def feed_forward(x: Tensor) -> Tensor:
        y = x @ p["inter_w"].T + p["inter_b"]
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return y @ p["output_w"].T + p["output_b"]

    if pre:
        x = x + attention(norm(x, p["norm_w"], p["norm_b"]))
        return x + feed_forward(norm(x, p["attn_nw"], p["attn_nb"]))
    x = norm(x + attention(x), p["attn_nw"], p["attn_nb"])
    return norm(x + feed_forward(x), p["norm_w"], p["norm_b"])


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("pre", [False, True])
def test_it_computes_its_formulas_forward_and_backward(pre: bool, again: bool) -> None:
    layer = make(pre_layer_norm=pre, gelu_checkpoint=again, attn_dropout_checkpoint=again).double()
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(BATCH, 1, 1, TOKENS, dtype=torch.float64)
    params = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    expected_x = x.detach().clone().requires_grad_()
    expected = by_formula(params, expected_x, mask, pre)
    expected.square().sum().backward()
    out = layer(x, mask)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-9, atol=1e-9)
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, params[name].grad, rtol=1e-9, atol=1e-9)


def test_initial_weights_are_copied_in_their_places() -> None:
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH,), (20, WIDTH), (WIDTH, 20), (WIDTH,)]
    weights = [torch.randn(shape) for shape in shapes]
    biases = [torch.randn(shape[0]) for shape in shapes]
    config = DeepSpeedTransformerConfig(hidden_size=WIDTH, intermediate_size=20, heads=HEADS)
    layer = DeepSpeedTransformerLayer(config, weights, biases)
    assert torch.equal(layer.attn_qkvw, torch.cat(weights[:3]))
    assert torch.equal(layer.attn_qkvb, torch.cat(biases[:3]))
    for name, at in (("attn_o", 3), ("attn_n", 4), ("inter_", 5), ("output_", 6), ("norm_", 7)):
        assert torch.equal(getattr(layer, f"{name}w"), weights[at])
        assert torch.equal(getattr(layer, f"{name}b"), biases[at])
    with pytest.raises(ValueError, match="8 tensors each, got 7"):
        DeepSpeedTransformerLayer(config, weights[:7])


def test_fresh_weights_that_lead_back_into_the_sum_are_smaller() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": -1, "heads": 2, "initializer_range": 0.5}
    config = DeepSpeedTransformerConfig(num_hidden_layers=8, **sizes)
    layer = DeepSpeedTransformerLayer(config)
    assert layer.inter_w.shape == (512, 128)
    for weight, deviation in (
        (layer.inter_w, 0.5),
        (layer.output_w, 0.125),
        (layer.attn_ow, 0.125),
    ):
        assert weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert (layer.attn_nw == 1).all() and (layer.norm_b == 0).all()


def test_dropout_is_of_training_and_tuples_are_returned_on_request() -> None:
    layer = make(hidden_dropout_ratio=0.5, attn_dropout_ratio=0.5, return_tuple=True)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    assert isinstance(layer(x), tuple)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    torch.testing.assert_close(layer.eval()(x)[0], layer(x)[0], rtol=0, atol=0)
    layer.train().config.training = False
    torch.testing.assert_close(layer(x)[0], layer(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"heads": 2}, "needs hidden_size"), ({"hidden_size": 10, "heads": 3}, "among 3 heads")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepSpeedTransformerLayer(DeepSpeedTransformerConfig(**sizes))
    with pytest.raises(ValueError, match="encoder's"):
        make()(torch.randn(BATCH, TOKENS, WIDTH), output_attentions=True)


def test_a_configuration_comes_from_a_dict_or_a_file(tmp_path: Path) -> None:
    wanted = {"hidden_size": 8, "heads": 2, "pre_layer_norm": False}
    (tmp_path / "c.json").write_text(json.dumps(wanted), encoding="utf-8")
    for config in (
        DeepSpeedTransformerConfig.from_dict(wanted),
        DeepSpeedTransformerConfig.from_json_file(str(tmp_path / "c.json")),
    ):
        assert (config.hidden_size, config.heads, config.pre_layer_norm) == (8, 2, False)


def test_the_engine_trains_copies_of_a_layer() -> None:
    layers = torch.nn.Sequential(*(copy.deepcopy(make()) for _ in range(2)))
    engine = deepspeed.initialize(
        model=layers,
        model_parameters=layers.parameters(),
        config={
            "train_batch_size": BATCH,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        },
    )[0]
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss = (engine(x.bfloat16()).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
