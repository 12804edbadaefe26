# SPDX-License-Identifier: Apache-2.0
"""DeepCompile on two ranks: what ZeRO does inside of graphs leaves every number as it is without them."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import deepspeed
from deepspeed.compile import graph_params
from deepspeed.compile.util import is_deepcompile_supported, is_inductor_supported
from deepspeed.utils import safe_get_full_fp32_param

pytestmark = pytest.mark.skipif(not is_deepcompile_supported(), reason="needs torch >= 2.6")
WIDTH, WORDS = 13, 50  # 13 is cut unevenly over two ranks


class Net(torch.nn.Module):
    """Embedding, blocks that share a norm, a frozen layer; `how` says what stands in the compiler's way."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.head = torch.nn.Linear(WIDTH, WORDS)

    @torch.compiler.disable
    def outside(self, x):
        return torch.nn.functional.linear(x, self.frozen.weight)

    def forward(self, x, y):
        h = self.words(x)
        for block in self.blocks:
            h = h + torch.nn.functional.gelu(block(self.norm(h)))
            if self.how == "looped":
                torch._dynamo.graph_break()  # in a loop: the whole function runs as it is
        if self.how == "broken":
            torch._dynamo.graph_break()
        h = self.outside(h) if self.how == "outside" else self.frozen(h)
        return torch.nn.functional.cross_entropy(self.head(h).view(-1, WORDS), y.view(-1))


def config_of(stage, compiled, persist):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 300,
            "stage3_param_persistence_threshold": persist,
            "stage3_prefetch_bucket_size": 400,
        },
        "compile": {"deepcompile": compiled, "free_activation": stage == 2},
    }


def train(rank, stage, kind, how, persist):
    """Losses and weights after two steps, one with a plain `loss.backward()`, and what was alive after forward passes."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    engine, *_ = deepspeed.initialize(model=Net(how), config=config_of(stage, bool(kind), persist))
    if kind:
        warnings.filterwarnings("ignore")  # the compiler's own
        engine.compile(backend=kind)
        assert engine.is_deepcompile_active()
    whole, plain = [], graph_params.GraphParams.finish_gather

    def watched(params, number):
        values = plain(params, number)
        whole.append(StorageWeakRef(values.untyped_storage()))
        return values

    graph_params.GraphParams.finish_gather = watched
    generator = torch.Generator().manual_seed(5 + rank)
    losses, kept = [], 0
    try:
        for step in range(4):
            x, y = (torch.randint(0, WORDS, (2, 7), generator=generator) for _ in range(2))
            with torch.no_grad():
                losses.append(engine.eval() or engine(x, y).item())
            engine.train()
            loss = engine(x, y)
            kept += sum(not each.expired() for each in whole)
            losses.append(loss.item())
            if step == 2:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
    finally:
        graph_params.GraphParams.finish_gather = plain
    if stage == 3 and persist == 0:
        # between passes, to whoever looks (or saves), sharded parameters are what they are without graphs
        assert all(p.numel() == 0 for p in engine.module.parameters())
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    weights = [safe_get_full_fp32_param(p).clone() for p in trained]
    graphs = len(engine.get_compile_time())
    engine.destroy()
    return losses, weights, len(whole), kept, graphs


def compare(rank, stage, kind, how, persist):
    want = train(rank, stage, None, how, persist)
    return want[:2], train(rank, stage, kind, how, persist)


@pytest.mark.parametrize(
    ("stage", "kind", "how", "persist"),
    [
        (1, "eager", "plain", 0),
        (2, "eager", "plain", 0),
        (3, "eager", "plain", 0),
        (3, "eager", "broken", 200),
        (3, "eager", "outside", 0),
        (3, "eager", "looped", 0),
        pytest.param(
            3,
            "inductor",
            "plain",
            0,
            marks=pytest.mark.skipif(
                not shutil.which("g++") or not is_inductor_supported(),
                reason="inductor needs a compiler, and torch 2.13 for this",
            ),
        ),
    ],
)
def test_graphs_with_zero_inside_change_no_number(stage, kind, how, persist, ranks2):
    for want, got in ranks2.run(compare, stage, kind, how, persist):
        # 'eager' runs the very same kernels, yet may recompute; inductor's fused ones round differently, once an operation
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=2e-6)
        _, _, gathers, kept, graphs = got
        assert (graphs >= 2) == (how != "looped")
        assert (gathers > 0) == (stage == 3 and how != "looped")
        # a graph drops what it gathered: at most the message buffer of the last one is still gloo's
        assert kept <= 4


class Divided(torch.nn.Module):
    """Pairs of column and row layers, 7 features over 2 ranks, and a head whose outputs are gathered."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 7) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(7, WIDTH) for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, 9)

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return self.head(x)


def train_divided(rank, stage, compiled):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {
                "use_default_specs": False,
                "layer_specs": [
                    {"patterns": [".*up.*weight$"], "partition_type": "column"},
                    {"patterns": [".*down.*weight$"], "partition_type": "row"},
                    {
                        "patterns": ["head.weight$"],
                        "partition_type": "column",
                        "gather_output": True,
                    },
                ],
            },
        },
        "compile": {"deepcompile": compiled, "passes": ["autotp"]},
    }
    engine, *_ = deepspeed.initialize(model=Divided(), config=config)
    graphs = []

    def backend(gm, inputs):
        graphs.append([str(node.target) for node in gm.graph.nodes])
        return gm.forward

    if compiled:
        torch._dynamo.reset()
        engine.compile(backend=backend)
        assert engine.is_deepcompile_active()
    generator = torch.Generator().manual_seed(8)
    found = []
    for _ in range(2):
        x = torch.randn(2, WIDTH, generator=generator, requires_grad=True)
        out = engine(x)
        engine.backward(out.square().mean())
        engine.step()
        found += [out.detach(), x.grad]
    found += [p.detach().clone() for p in engine.module.parameters()]
    engine.destroy()
    return found, graphs


def compare_divided(rank, stage):
    warnings.filterwarnings("ignore")
    want, _ = train_divided(rank, stage, False)
    return want, *train_divided(rank, stage, True)


@pytest.mark.parametrize("stage", [0, 1])
def test_collectives_of_divided_layers_are_in_one_graph_and_change_no_number(stage, ranks2):
    for want, got, graphs in ranks2.run(compare_divided, stage):
        torch.testing.assert_close(got, want, rtol=0, atol=0)  # the same sums in the same order
        assert len(graphs) == 1, graphs
