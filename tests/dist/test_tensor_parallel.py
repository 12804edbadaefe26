# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel training on 2 ranks against the same model whole, in float64; checkpoints of its parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import deepspeed
from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.module_inject.layers import (
    GatherReplacedLayerParams,
    LinearAllreduce,
    LinearLayer,
    LmHeadLinearAllreduce,
    SubParamLinearLayer,
)
from deepspeed.utils import groups

WIDTH, HEAD, HEADS, KV_HEADS, WORDS = 12, 2, 6, 3, 11
STEPS, CLIP, RATE, EPSILON = 3, 0.05, 0.02, 1e-3
# fp32 sums in another order, through three steps whose divisor is at least EPSILON
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


class Attention(nn.Module):
    """3 key-value heads of 2 over 2 ranks: 2 and 1."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.q_norm = nn.LayerNorm(HEAD)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
        found = functional.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True)
        return self.o_proj(found.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """7 features over 2 ranks: 4 and 3."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 7)
        self.down_proj = nn.Linear(7, WIDTH)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.norm = Attention(), Mlp(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.self_attn(self.norm(x))
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_size=WIDTH
        )
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.layers[1].mlp.requires_grad_(False)
        self.packed = nn.Linear(WIDTH, 10)  # two weights of 6 and 4 in one
        self.lm_head = nn.Linear(5, WORDS, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        a, b = self.packed(x).split([6, 4], -1)
        x = torch.cat([a[..., :3] * a[..., 3:], b[..., :2] - b[..., 2:]], -1)
        logits = self.lm_head(x)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


RULES = [
    {"patterns": [r"lm_head\.weight$"], "partition_type": "row", "split_input": True},
    {"patterns": [r"packed\.weight$"], "shape": [[6, 4], -1], "gather_output": True},
]


def batches(count=STEPS, first=0):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + step)
        yield torch.randint(0, WORDS, (2, 5), generator=generator)


def start(seed=0, size=2, stage=0, overlap=False, **extra):
    section = {
        "autotp_size": size,
        "tp_overlap_comm": overlap,
        "partition_config": {"layer_specs": RULES},
    }
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "eps": EPSILON, "weight_decay": 0.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": CLIP,
        **({"tensor_parallel": section} if size > 1 else {}),
        **extra,
    }
    return deepspeed.initialize(model=Model(seed), config=config)[0]


def train(engine, data):
    losses = []
    for tokens in data:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def reference(steps=STEPS):
    """Losses, gradient norm of the last step, and weights after each of the steps."""
    model = Model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses, norm = [], None
    for tokens in batches(steps):
        loss = model(tokens)
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        losses.append(loss.item())
    return losses, norm, {name: value.float() for name, value in model.state_dict().items()}


def whole_weights(engine):
    """All weights on all ranks, by gathering the divided ones; they are as before afterwards."""
    parts = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    with GatherReplacedLayerParams(list(engine.module.parameters()), engine.module):
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for name, p in engine.module.named_parameters():
        assert torch.equal(p, parts[name]), name
    return found


def trains(rank, stage, overlap):
    engine = start(seed=rank, stage=stage, overlap=overlap)  # rank 0's weights are taken
    losses = train(engine, batches())
    found = {
        "losses": losses,
        "norm": float(engine.get_global_grad_norm()),
        "saved": engine._consolidated_16bit_state_dict(),
        "size": engine.autotp_size(),
        "mpu": engine.mpu is groups,
        "data ranks": engine.dp_world_size,
        "weights": whole_weights(engine) if stage < 3 else None,
    }
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("stage", "overlap"), [(0, False), (1, True), (2, False), (3, False)], ids=str
)
def test_it_trains_as_the_whole_model(ranks2, stage, overlap):
    losses, norm, weights = reference()
    first, second = ranks2.run(trains, stage, overlap)
    for found in (first, second):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert found["norm"] == pytest.approx(norm, rel=1e-4)
        assert (found["size"], found["mpu"], found["data ranks"]) == (2, True, 1)
        for name, expected in weights.items() if stage < 3 else ():
            torch.testing.assert_close(found["weights"][name], expected, **CLOSE, msg=name)
    assert second["saved"] is None and first["saved"].keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(first["saved"][name], expected, **CLOSE, msg=name)


def kinds(rank):
    engine = start()
    layer = engine.module.layers[0]
    found = {
        name: (type(module).__name__, tuple(module.weight.shape))
        for name, module in engine.module.named_modules()
        if isinstance(module, (LinearLayer, LinearAllreduce))
    }
    assert isinstance(engine.module.lm_head, LmHeadLinearAllreduce)
    assert isinstance(engine.module.packed, SubParamLinearLayer)
    assert type(layer.norm) is nn.LayerNorm
    told = []
    for broken in (torch.full((2, 5), rank), torch.zeros(2, 5 + rank, dtype=torch.long)):
        engine = start()
        try:
            engine(broken)
        except AssertionError as error:
            told.append(str(error))
    return found, told


def test_layers_are_cut_at_heads_and_unequal_batches_are_refused_on_all_ranks(ranks2):
    for (found, told), kv, features in zip(ranks2.run(kinds), (2, 1), (4, 3), strict=True):
        attention, mlp = "layers.1.self_attn.", "layers.1.mlp."
        assert found[attention + "q_proj"] == ("LinearLayer", (kv * 4, WIDTH))
        assert found[attention + "v_proj"] == ("LinearLayer", (kv * 2, WIDTH))
        assert found[attention + "o_proj"] == ("LinearAllreduce", (WIDTH, kv * 4))
        assert found[mlp + "up_proj"] == ("LinearLayer", (features, WIDTH))
        assert found[mlp + "down_proj"] == ("LinearAllreduce", (WIDTH, features))
        assert len(told) == 2 and all("Data inconsistency within the TP group" in t for t in told)


def resumes(rank, folder, stage):
    engine = start(stage=stage)
    train(engine, batches(2))
    engine.save_checkpoint(folder, tag="parts")
    if rank == 0:
        convert(f"{folder}/parts", f"{folder}/whole")
    torch.distributed.barrier()
    again = start(seed=1, stage=stage)
    again.load_checkpoint(folder, tag="parts")
    losses = {"parts": train(again, batches(1, first=2))}
    universal = {"checkpoint": {"load_universal": True}}
    for size in (2, 1):
        fresh = start(seed=2, size=size, stage=stage, **universal)
        fresh.load_checkpoint(folder, tag="whole")
        losses[f"whole on {size}"] = train(fresh, batches(1, first=2))
        weights = fresh._consolidated_16bit_state_dict()
    return losses, weights


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_goes_on_on_the_same_ranks_and_as_a_whole_on_others(ranks2, tmp_path, stage):
    losses, _, weights = reference()
    found = ranks2.run(resumes, str(tmp_path), stage, timeout=240)
    for told, _ in found:
        assert {name: pytest.approx(losses[-1:], rel=1e-5) for name in told} == told
    for name, expected in weights.items():
        torch.testing.assert_close(found[0][1][name], expected, **CLOSE, msg=name)
