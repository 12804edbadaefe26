# SPDX-License-Identifier: Apache-2.0
"""The hybrid engine: generation between training steps, with adapters fused, at every stage."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.rollout import RolloutConfig, RolloutRequest, SamplingConfig, build_rollout

VOCABULARY, WIDTH = 17, 8


class Lora(torch.nn.Module):
    """A linear layer with an adapter, in DeepSpeed-Chat's form."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
        self.lora_right_weight = torch.nn.Parameter(torch.randn(WIDTH, 2) * 0.3)
        self.lora_left_weight = torch.nn.Parameter(torch.randn(2, WIDTH) * 0.3)
        self.lora_scaling = 0.5
        self.fuse_lora = False
        self.fused_calls = 0

    def forward(self, x):
        base = torch.nn.functional.linear(x, self.weight, self.bias)
        if self.fuse_lora:
            self.fused_calls += 1
            return base
        return base + (x @ self.lora_right_weight @ self.lora_left_weight) * self.lora_scaling


class Model(torch.nn.Module):
    """A causal model in small: each token's logits follow from the mean of all before it."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList(Lora() for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        x = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)

    def generate(self, ids, max_new_tokens=1, attention_mask=None, eos_token_id=None, **_):
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], dim=1)
            if eos_token_id is not None and bool((ids[:, -1] == eos_token_id).all()):
                break
        return ids


def made() -> Model:
    torch.manual_seed(3)
    return Model()


def prompt(rank: int) -> torch.Tensor:
    return torch.randint(
        0, VOCABULARY, (2, 3 + rank), generator=torch.Generator().manual_seed(rank)
    )


def loss_of(model, rank: int) -> torch.Tensor:
    ids = prompt(rank)
    return torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def plain() -> list[list[torch.Tensor]]:
    """What a plain loop generates before each of three steps, on each of two ranks, and after."""
    model = made()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for _ in range(4):
        with torch.no_grad():
            seen.append([model.generate(prompt(r), max_new_tokens=5 + r) for r in range(2)])
        optimizer.zero_grad()
        ((loss_of(model, 0) + loss_of(model, 1)) / 2).backward()
        optimizer.step()
    return seen


def run(rank: int, cells) -> list[list[torch.Tensor]]:
    found = []
    for zero, at_once in cells:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.01}},
            "zero_optimization": zero,
            "hybrid_engine": {"enabled": True, "pin_parameters": at_once},
        }
        engine = deepspeed.initialize(model=made(), config=config)[0]
        assert isinstance(engine, deepspeed.DeepSpeedHybridEngine)
        blocks, seen = list(engine.module.blocks), []
        with deepspeed.zero.GatheredParameters(engine.module.parameters()):
            before = blocks[0].weight.detach().clone()
        for _ in range(4):
            engine.eval()
            # ranks answer at different lengths where nothing is gathered on the way
            extra = rank if at_once else 0
            seen.append(engine.module.generate(prompt(rank), max_new_tokens=5 + extra))
            assert (blocks[0].fused_calls > 0) is at_once and not blocks[0].fuse_lora
            engine.train()
            engine.backward(loss_of(engine, rank))
            engine.step()
        with deepspeed.zero.GatheredParameters(engine.module.parameters()):
            assert torch.equal(blocks[0].weight, before), "fusing left its mark"
        found.append(seen)
        engine.destroy()
        assert "generate" not in engine.module.__dict__
    return found


STAGES = [({"stage": stage}, True) for stage in (0, 1, 2, 3)]
STAGES += [
    ({"stage": 3, "offload_param": {"device": "cpu"}}, True),
    ({"stage": 3, "stage3_param_persistence_threshold": 0}, False),
]


def test_every_stage_generates_what_a_plain_loop_does(ranks2):
    want = plain()
    assert not torch.equal(want[0][0], want[3][0]), "training changes the answers"
    for rank, found in enumerate(ranks2.run(run, STAGES, timeout=240)):
        for (zero, at_once), seen in zip(STAGES, found, strict=True):
            for got, expected in zip(seen, want, strict=True):
                assert torch.equal(got, expected[rank][:, : got.shape[1]]), zero
                assert at_once or got.shape[1] == prompt(rank).shape[1] + 5


def explicit(rank: int) -> None:
    config = {"train_micro_batch_size_per_gpu": 2, "hybrid_engine": {"enabled": True}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.05}}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine = deepspeed.initialize(model=made(), config=config)[0]
    with pytest.raises(RuntimeError, match="GatheredParameters"):
        engine.fuse_lora_weight()
    layer = engine.module.blocks[1]
    assert [len(params) for params in engine.layer_params] == [2, 2]
    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        old = layer.weight.detach().clone()
        delta = 0.5 * (layer.lora_right_weight @ layer.lora_left_weight).t().double()
        engine.fuse_lora_weight()
        # one product and one sum in fp32
        want = (old.double() + delta).float()
        torch.testing.assert_close(layer.weight.detach(), want, atol=1e-6, rtol=0)
        engine.fuse_lora_weight()
        torch.testing.assert_close(layer.weight.detach(), want, atol=1e-6, rtol=0)
        engine.unfuse_lora_weight()
        assert torch.equal(layer.weight, old)
    engine.destroy()


def test_adapters_are_fused_on_request_and_put_back(ranks2):
    ranks2.run(explicit)


def rollout(rank: int) -> None:
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.05}}
    ids = prompt(rank)
    request = RolloutRequest(ids, torch.ones_like(ids))
    for hybrid in (True, False):
        config["hybrid_engine"] = {"enabled": hybrid}
        engine = deepspeed.initialize(model=made(), config=config)[0]
        answer = made().generate(ids[:1], max_new_tokens=4)[0, ids.shape[1] :]
        end = int(answer[1])  # the first prompt's answer ends with its second token, at the latest
        first = int((answer == end).nonzero()[0])
        tokens = type("Tokens", (), {"pad_token_id": None, "eos_token_id": end})
        engine.train()
        made_by = build_rollout(RolloutConfig(), engine, tokens)
        batch = made_by.generate(request, SamplingConfig(4, temperature=0, n_samples_per_prompt=2))
        assert engine.module.training
        assert batch.batch_size == 4 and batch.response_start_idx.tolist() == [ids.shape[1]] * 4
        assert torch.equal(batch.input_ids[0], batch.input_ids[1])
        shown = batch.attention_mask[0, ids.shape[1] :].tolist()
        assert shown == [int(i <= first) for i in range(len(shown))]
        engine.destroy()


def test_rollouts_mask_what_follows_the_end(ranks2):
    ranks2.run(rollout)
