# SPDX-License-Identifier: Apache-2.0
"""Models of all shapes in one process: frozen, unused, tied, empty, scalar, mixed; and what they weigh in memory."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepspeed

STAGES = [0, 1, 2]


def start(net, stage, params=None, **extra):
    cfg = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}},
        **extra,
    }
    engine, *_ = deepspeed.initialize(model=net, model_parameters=params, config=cfg)
    return engine


class Odd(torch.nn.Module):
    """A tied weight, a frozen one, an unused one, an empty one and a scalar."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(11, 8)
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.ones(5))
        self.empty = torch.nn.Parameter(torch.ones(0))
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, ids):
        hidden = torch.relu(self.body(self.embed(ids))) * self.frozen * self.scale
        return self.head(hidden) + self.empty.sum()


def train_plain(net, steps):
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, foreach=False
    )
    for k in range(steps):
        optimizer.zero_grad()
        loss(net, k).backward()
        optimizer.step()


def loss(net, k):
    ids = torch.tensor([[k % 11, (3 * k + 1) % 11], [5, 7]])
    return torch.nn.functional.cross_entropy(net(ids).flatten(0, 1).float(), ids.flatten().roll(1))


@pytest.mark.parametrize("stage", STAGES)
def test_odd_models_train_like_plain_torch(stage):
    net, twin = Odd(), Odd()
    engine = start(net, stage)
    for k in range(4):
        engine.backward(loss(engine, k))
        engine.step()
    train_plain(twin, 4)
    assert net.head.weight is net.embed.weight
    for (name, got), want in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-6, atol=4.8e-7, msg=name
        )  # 4 steps, one ulp at 1 each
    assert torch.equal(net.frozen, torch.ones(8)) and torch.equal(net.unused, torch.ones(5))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_odd_models_initialize_and_train_in_half_precision(stage, dtype):
    section = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    engine = start(Odd(), stage, **{section: {"enabled": True}})
    first = loss(engine, 0).item()
    for _ in range(8):
        engine.backward(loss(engine, 0))
        engine.step()
    assert loss(engine, 0).item() < first


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_of_several_dtypes_keeps_them(stage):
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 6).bfloat16(), torch.nn.Linear(6, 6).double(), torch.nn.Linear(6, 2)
    )

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net[2](self.net[1](self.net[0](x.bfloat16()).double()).float())

    # FusedAdam refuses fp64, torch's does not.
    adam = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
    engine = start(Mixed(), stage, optimizer=adam)
    x = torch.randn(2, 6)
    losses = []
    for _ in range(5):
        value = engine(x).square().mean()
        engine.backward(value)
        engine.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert [p.dtype for p in net.parameters()] == [torch.bfloat16] * 2 + [torch.float64] * 2 + [
        torch.float32
    ] * 2
    assert [g.dtype for g in engine.optimizer.groups] == [
        torch.bfloat16,
        torch.float64,
        torch.float32,
    ]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_checkpointed_twice_gets_its_whole_gradient(stage, reentrant):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.first = torch.nn.Linear(4, 4)
            self.shared = torch.nn.Linear(4, 4)

        def forward(self, x, use):
            x = self.first(x)
            for _ in range(2):
                x = checkpoint(self.shared, x, use_reentrant=reentrant) if use else self.shared(x)
            return x

    runs = []
    for use in (False, True):
        engine = start(Twice(), stage)
        for k in range(3):
            engine.backward(engine(torch.full((2, 4), k + 1.0), use).square().mean())
            engine.step()
        runs.append([p.detach().clone() for p in engine.module.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-6
        )  # gradients of the two uses are added in another order


@pytest.mark.parametrize("stage", [1, 2])
def test_a_flag_defers_a_gradient_that_comes_in_instalments(stage):
    net = torch.nn.Linear(3, 3, bias=False)
    engine = start(net, stage)
    twin = torch.nn.Linear(3, 3, bias=False)
    twin.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    x = torch.randn(2, 3)
    net.weight.ds_grad_is_ready = False
    engine.backward(engine(x).square().mean())
    assert net.weight.grad is not None
    net.weight.ds_grad_is_ready = True
    engine.backward(engine(2 * x).square().mean())
    engine.step()
    (twin(x).square().mean() + twin(2 * x).square().mean()).backward()
    optimizer.step()
    torch.testing.assert_close(net.weight, twin.weight, rtol=1e-6, atol=2.4e-7)


def held_bytes(engine):
    """Bytes of all distinct buffers that parameters, gradients, masters and states keep between steps."""
    tensors = list(engine.module.parameters()) + [p.grad for p in engine.module.parameters()]
    for group in engine.optimizer.groups:
        for part in group.parts:
            tensors += [
                part.master,
                part.held_grad,
                part.low,
                *engine.optimizer.state[part.master].values(),
            ]
    storages = {}
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.numel() > 1:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("stage", "section", "per_param"),
    [
        (
            1,
            "bf16",
            2 + 2 + 12,
        ),  # params, gradients, and fp32 master, momentum, variance (arXiv:1910.02054, table 1)
        (2, "bf16", 2 + 2 + 12),
        (1, "fp16", 2 + 2 + 12),
        (2, "fp16", 2 + 2 + 12),
        (2, None, 4 + 4 + 8),  # fp32 parameters are their own masters
    ],
)
def test_memory_is_the_papers_formula_on_one_rank(stage, section, per_param, offload):
    net = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
    numel = sum(p.numel() for p in net.parameters())
    extra = {section: {"enabled": True}} if section else {}
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    engine = start(net, stage, zero_optimization=zero, **extra)
    dtype = next(net.parameters()).dtype
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 128, dtype=dtype)).float().square().mean())
        engine.step()
    assert held_bytes(engine) == pytest.approx(per_param * numel, rel=0.02)


@pytest.mark.parametrize(("name", "kind"), [("MuAdamW", "AdamW"), ("musgd", "SGD")])
def test_optimizers_by_width_come_from_mup(monkeypatch, name, kind):
    def of_mup(params, decoupled_wd=False, **options):
        return getattr(torch.optim, kind)([{"params": list(params), "lr": 0.5}], **options)

    fake = SimpleNamespace(MuAdamW=of_mup, MuSGD=of_mup, __spec__=ModuleSpec("mup", None))
    monkeypatch.setitem(sys.modules, "mup", fake)
    section = {"type": name, "params": {"lr": 0.1}}
    engine = start(Odd(), 2, optimizer=section, zero_allow_untested_optimizer=True)
    assert type(engine.optimizer.optimizer).__name__ == kind
    assert engine.get_lr() == [0.5]
