# SPDX-License-Identifier: Apache-2.0
"""DeepCompile in one process: schedules and their contracts, where nodes go, and when plain torch.compile takes over."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph, GraphModule

import deepspeed
from deepspeed.compile import graph_ops, session
from deepspeed.compile.backend import DeepCompileBackend
from deepspeed.compile.config import CompileConfig
from deepspeed.compile.graph_params import GraphParams
from deepspeed.compile.passes import contract, prefetch
from deepspeed.compile.profilers import ProfilingResult, memory_rows
from deepspeed.compile.util import get_last_uses, get_real_uses, is_deepcompile_supported
from deepspeed.runtime.compiler import is_compiling
from deepspeed.utils.logging import logger

needs_torch = pytest.mark.skipif(not is_deepcompile_supported(), reason="needs torch >= 2.6")


class Net(torch.nn.Sequential):
    """With a forward pass of its own: torch 2.7 does not compile torch's."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def start(stage, passes=None, **more):
    torch.manual_seed(0)
    torch.compiler.reset()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "compile": {"deepcompile": True, "passes": passes},
        **more,
    }
    net = Net(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    return deepspeed.initialize(model=net, config=config)[0]


def step(engine):
    loss = engine(torch.ones(2, 4)).square().sum()
    engine.backward(loss)
    engine.step()
    return loss.item()


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_a_pass_of_the_callers_runs_on_both_graphs_from_its_step_on():
    calls = []

    def note(
        gm, graph_id, graph_order, profiling_results, create_inputs_fn, mem_budget, params, bwd
    ):
        rows = profiling_results[graph_id].bwd_mem if bwd else profiling_results[graph_id].fwd_mem
        calls.append((engine.global_steps, bwd, len(params[graph_id].ds_ids), bool(rows)))

    engine, plain = start(1), start(1)
    engine.register_compile_pass("note", note)
    engine.compile(backend="eager", schedule=[(0, ["z1"]), (2, ["z1", "note"])])
    assert [step(engine) for _ in range(4)] == [step(plain) for _ in range(4)]
    # the backward graph needs no first layer's weight, which no gradient goes through
    assert [call[:2] for call in calls] == [(2, False), (2, True)]
    assert calls[0][2] == 4 and all(call[3] for call in calls)
    assert len(engine.get_compile_time()) == 2
    engine.destroy()
    assert not engine.is_deepcompile_active()


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_a_module_whose_engine_is_gone_has_its_gradients_again():
    engine = start(1)
    engine.compile(backend="eager")
    step(engine)
    module = engine.module
    engine.destroy()
    module(torch.ones(2, 4)).square().sum().backward()
    assert all(param.grad is not None for param in module.parameters())


@needs_torch
def test_a_schedule_that_breaks_a_contract_is_refused():
    with pytest.raises(contract.PassContractError, match="requires"):
        start(1).compile(backend="eager", schedule=[(0, ["z1", "prefetch"])])


@pytest.mark.parametrize(("stage", "passes"), [(1, ["z3"]), (3, ["z1"])])
def test_passes_of_another_stage_are_refused(stage, passes):
    with pytest.raises(ValueError, match="another ZeRO stage"):
        start(stage, passes).compile(backend="eager")


def test_collectives_of_layers_take_no_schedule():
    with pytest.raises(NotImplementedError, match="takes no schedule"):
        start(0, ["autotp"]).compile(backend="eager", schedule=[(0, [])])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stage", "backend", "why"), [(0, "eager", "stage 0"), (2, "aot_eager", "aot_eager")]
)
def test_plain_compilation_takes_over_where_graphs_cannot_and_says_so(stage, backend, why, caplog):
    engine = start(stage)
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger.name):
            engine.compile(backend=backend)
    finally:
        logger.removeHandler(caplog.handler)
    assert engine.is_compiled and engine.is_deepcompile_enabled()
    if is_deepcompile_supported():
        assert not engine.is_deepcompile_active() and why in caplog.text
    assert step(engine) > 0


@pytest.mark.filterwarnings("ignore")
def test_an_inductor_that_drops_operators_is_refused(monkeypatch):
    monkeypatch.setattr(session, "is_inductor_supported", lambda: False)
    engine = start(2)
    if is_deepcompile_supported():
        assert "'inductor' needs torch >= 2.13" in session.why_not(engine, "inductor")
        assert session.why_not(engine, "eager") is None


def gathering(uses):
    """A graph that gathers and uses one parameter after the other."""
    graph_ops.define_ops()
    graph = Graph()
    shells = [graph.placeholder(f"p{number}") for number in range(uses)]
    value = graph.placeholder("x")
    for number, shell in enumerate(shells):
        token = graph.call_function(torch.ops.dc.allgather_param.default, (shell, 0, number))
        whole = graph.call_function(torch.ops.dc.wait_allgather.default, (token, 0, number))
        value = graph.call_function(torch.add, (value, whole))
    graph.output((value,))
    return GraphModule(torch.nn.Module(), graph)


def order_of(gm):
    short = {
        torch.ops.dc.allgather_param.default: "start",
        torch.ops.dc.wait_allgather.default: "wait",
    }
    return [
        f"{short[n.target]}{n.args[2]}" if n.target in short else "use"
        for n in gm.graph.nodes
        if n.op == "call_function"
    ]


@needs_torch
@pytest.mark.parametrize(
    ("ahead", "live", "want"),
    [
        (0, 100, "start0 wait0 use start1 wait1 use start2 wait2 use"),
        (10, 100, "start0 start1 wait0 use start2 wait1 use wait2 use"),
        (20, 100, "start0 start1 start2 wait0 use wait1 use wait2 use"),
        (20, 20, "start0 start1 wait0 use start2 wait1 use wait2 use"),
    ],
)
def test_gathers_start_ahead_within_both_limits_and_in_the_order_of_use(ahead, live, want):
    gm = gathering(3)
    managed = SimpleNamespace(prefetch_numel=ahead, max_live_numel=live, numel_of=lambda _: 10)
    known = {0: ProfilingResult()}
    prefetch.schedule_prefetch(gm, 0, [(0, False)], known, tuple, 0.0, {0: managed}, False)
    assert order_of(gm) == want.split()


def test_views_are_no_uses_and_the_last_use_is_found_behind_them():
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.relu, (x,))
    view = graph.call_function(torch.ops.aten.t.default, (a,))
    used = graph.call_function(torch.neg, (view,))
    graph.output((used,))
    last, ends = get_last_uses(graph)
    assert last[a] is used and a in ends[used]
    assert get_real_uses(graph)[a] == [used]


def test_memory_is_counted_from_first_to_last_use():
    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.relu, (x,))
    b = graph.call_function(torch.neg, (a,))
    graph.output((b,))
    for node in (x, a, b):
        node.meta["val"] = torch.empty(4, device="meta")
    assert memory_rows(graph, 100) == [("relu", 116, 16, 116), ("neg", 116, 0, 132)]


@pytest.mark.filterwarnings("ignore")
def test_code_between_graphs_is_not_being_compiled():
    seen = []

    def ask(x):
        for _ in range(1):
            torch._dynamo.graph_break()  # in a loop: the function runs as it is, and so does what it calls
        seen.append(is_compiling())
        return x + 1

    torch.compile(ask, backend="eager")(torch.ones(1))
    assert seen == [False]


def test_each_pass_is_known_by_its_function_too():
    from deepspeed.compile import session

    session._register_own()
    for name, function in session.opt_passes.items():
        assert contract._name_of(function, session.opt_passes) == name


def test_a_backward_graph_that_loses_gradients_raises():
    params = GraphParams([], None, None, lambda grad: None, CompileConfig())
    backend = DeepCompileBackend("eager", params, CompileConfig(), 0, 0)

    def hands_over(args):
        params.taken += len(args)
        return args

    assert backend._counting(2, hands_over)([1, 2]) == [1, 2]
    with pytest.raises(RuntimeError, match="lost gradients.*got 1 gradients.*expected 2"):
        backend._counting(2, hands_over)([1])
