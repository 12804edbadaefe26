# SPDX-License-Identifier: Apache-2.0
"""The torch.compile backend that runs passes over the forward and the backward graph of each traced frame.

[Note: One frame's way]
Dynamo traces a frame; its inputs are the parameters and what the caller passed. Autograd is traced through it, the joint
graph is cut in two, the passes of the schedule's current step edit both, and 'eager' runs them as they are while
'inductor' compiles them. The arguments of the two graphs are told apart by their places: forward input k is primal k in
both, and output k of the backward graph is its gradient.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import log_dist, logger

from . import fx
from .config import CompileConfig
from .graph_params import GraphParams
from .partitioner import _recompute_param_aliases
from .profilers import ProfilingResult, memory_rows

BACKENDS = ("inductor", "eager")
_PRIMAL = re.compile(r"(?:primals_(\d+)|arg(\d+)_1)$")


@dataclass(frozen=True)
class GraphParam:
    """One parameter of a graph.

    Attributes:
        param: the parameter.
        numel, dtype: of the whole of it.
    """

    param: Any
    numel: int
    dtype: torch.dtype


@dataclass
class GraphParamManager:
    """The parameters of one graph, as passes see them.

    Attributes:
        owner: the parameters of the engine.
        params: by the name of the graph's input.
        ds_ids: the number that the operators know each by, by the name of the input.
        grads: the number, by the place of the gradient among the backward graph's outputs.
        prefetch_numel, max_live_numel: limits of `zero_optimization`, in elements.
    """

    owner: GraphParams
    prefetch_numel: int
    max_live_numel: int
    params: dict[str, GraphParam] = field(default_factory=dict)
    ds_ids: dict[str, int] = field(default_factory=dict)
    grads: dict[int, int] = field(default_factory=dict)

    def gathers(self, number: int) -> bool:
        """Whether the graph has to gather a parameter."""
        return self.owner.gathers(number)

    def numel_of(self, number: int) -> int:
        """Elements of a parameter."""
        return int(self.owner.param(number).ds_numel)


@dataclass
class Frame:
    """One traced frame on its way through the compiler.

    Attributes:
        graph_id: the number that the operators know it by.
        numbers: of each input the number of the parameter that it is, or None.
    """

    graph_id: int
    numbers: list[int | None]


class _ForParams:
    """A traced frame, compiled for each set of parameters that it is called with.

    To dynamo parameters are inputs like any others: what it traced of one layer serves the next of the same class. Our
    graphs say whose gradient they hand over.
    """

    def __init__(self, backend: DeepCompileBackend, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self._backend, self._number_of = backend, backend.owner.number_of
        self._gm = GraphModule(gm, copy.deepcopy(gm.graph))  # compilers change what they are given
        self._first, self._run_first = self._numbers(inputs), backend.compile_for(gm, inputs)
        self._others: dict[Any, Callable[..., Any]] = {}

    def _numbers(self, inputs: Sequence[Any]) -> tuple[int | None, ...]:
        return tuple(map(self._number_of, inputs))

    def __call__(self, *inputs: Any) -> Any:
        numbers = self._numbers(inputs)
        if numbers == self._first:
            return self._run_first(*inputs)
        # What is compiled here is of these shapes; dynamo's own may be of any.
        key = (numbers, tuple(map(_form, inputs)))
        if key not in self._others:
            gm = GraphModule(self._gm, copy.deepcopy(self._gm.graph))
            self._others[key] = self._backend.compile_for(gm, inputs)
        return self._others[key](*inputs)


def _form(value: Any) -> Any:
    return (value.shape, value.stride()) if isinstance(value, torch.Tensor) else value


class DeepCompileBackend:
    """Compiles frames for one engine.

    Args:
        kind: "inductor" or "eager".
        owner: the engine's parameters.
        config: section `compile`.
        prefetch_numel, max_live_numel: limits of `zero_optimization`, in elements.

    Attributes:
        passes: what to run on graphs that are compiled from now on.
        times: for each graph its number and the seconds that it took.
    """

    def __init__(
        self,
        kind: str,
        owner: GraphParams,
        config: CompileConfig,
        prefetch_numel: int,
        max_live_numel: int,
    ) -> None:
        self.kind, self.owner, self.config = kind, owner, config
        self._limits = (prefetch_numel, max_live_numel)
        self.passes: list[Callable[..., Any]] = []
        self.times: list[tuple[int, float]] = []
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Graphs are going to be compiled anew."""
        self.param_manager: dict[int, GraphParamManager] = {}
        self.profiling_results: dict[int, ProfilingResult] = {}
        self.graph_order: list[tuple[int, bool]] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile what dynamo traced; `example_inputs` are the real inputs, parameters themselves among them."""
        return _ForParams(self, gm, example_inputs)

    def compile_for(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a frame for the parameters that are among `inputs`."""
        began = time.perf_counter()
        frame = Frame(self.owner.new_graph(), [self.owner.number_of(each) for each in inputs])
        trained = torch.is_grad_enabled() and any(
            isinstance(each, torch.Tensor) and each.requires_grad for each in inputs
        )
        self.param_manager[frame.graph_id] = GraphParamManager(self.owner, *self._limits)
        self.profiling_results[frame.graph_id] = ProfilingResult(needs_backward=trained)
        self.graph_order.append((frame.graph_id, trained))
        build = self._with_inductor if self.kind == "inductor" else self._with_eager
        compiled = build(frame, gm, inputs)
        self.times.append((frame.graph_id, time.perf_counter() - began))
        return compiled

    # - the two compilers

    def _with_eager(
        self, frame: Frame, gm: GraphModule, inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        from functorch.compile import min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
            self._mark(frame, joint.graph)
            return min_cut_rematerialization_partition(joint, *args, **kwargs)

        def compile_graph(bwd: bool, graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            self._run_passes(frame, graph, bwd)
            run = _boxed(graph, frees_inputs=self.config.free_activation)
            return self._counting(_handed_over(graph), run) if bwd else run

        with torch._functorch.config.patch(enable_autograd_cache=False):
            compiler = aot_autograd(
                fw_compiler=partial(compile_graph, False),
                bw_compiler=partial(compile_graph, True),
                partition_fn=partition,
            )
            return compiler(gm, inputs)

    def _with_inductor(
        self, frame: Frame, gm: GraphModule, inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        from torch._inductor import config as inductor_config
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def compile_graph(graph: GraphModule, args: Sequence[Any], **kwargs: Any) -> Any:
            bwd = bool(kwargs.get("is_backward"))
            self._run_passes(frame, graph, bwd)
            promised = _handed_over(graph)  # compilers change what they are given
            run = compile_fx_inner(graph, args, **kwargs)
            return self._counting(promised, run) if bwd else run

        # What these caches know of a graph is from before the passes.
        settings = {
            "fx_graph_cache": False,
            "joint_custom_pre_pass": partial(self._mark, frame),
        }
        with (
            torch._functorch.config.patch(enable_autograd_cache=False),
            inductor_config.patch(settings),
        ):
            return compile_fx(gm, inputs, inner_compile=compile_graph)

    def _counting(self, promised: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """A backward graph that raises if what runs hands over fewer gradients than its operators say."""

        def counted(args: list[Any]) -> Any:
            before = self.owner.taken
            outputs = run(args)
            if self.owner.taken - before != promised:
                raise RuntimeError(
                    explain(
                        "a compiled backward graph lost gradients",
                        got=f"{self.owner.taken - before} gradients from torch {torch.__version__}'s {self.kind}",
                        expected=f"{promised}",
                        fix="set compile.deepcompile to false, or compile with backend='eager'",
                    )
                )
            return outputs

        counted._boxed_call = True  # type: ignore[attr-defined]
        return counted

    def _mark(self, frame: Frame, joint: Graph) -> None:
        """Have no view of a parameter that is gathered kept for the backward pass."""
        gathered = [
            (place, number, self.owner.param(number).shape)
            for place, number in enumerate(frame.numbers)
            if number is not None and self.owner.gathers(number)
        ]
        if gathered:
            _recompute_param_aliases(joint, gathered)

    # - passes

    def _run_passes(self, frame: Frame, gm: GraphModule, bwd: bool) -> None:
        self._take_params(frame, gm, bwd)
        result = self.profiling_results[frame.graph_id]
        if bwd:
            result.bwd_graph = gm.graph
        else:
            result.fwd_graph = gm.graph
        base = get_accelerator().memory_allocated()
        for each in self.passes:
            rows = memory_rows(gm.graph, base)
            result.fwd_mem, result.bwd_mem = (
                (result.fwd_mem, rows) if bwd else (rows, result.bwd_mem)
            )
            each(
                gm,
                frame.graph_id,
                self.graph_order,
                self.profiling_results,
                _no_inputs,
                0.0,
                self.param_manager,
                bwd=bwd,
            )
        if self.config.debug_log:
            which = "backward" if bwd else "forward"
            log_dist(f"DeepCompile: graph {frame.graph_id}, {which}:\n{gm.graph}", ranks=[0])

    def _take_params(self, frame: Frame, gm: GraphModule, bwd: bool) -> None:
        """Find the parameters among a graph's inputs, and their gradients among its outputs."""
        managed = self.param_manager[frame.graph_id]
        managed.params.clear()
        managed.ds_ids.clear()
        for node in gm.graph.nodes:
            place = _place_of(node.name) if node.op == "placeholder" else None
            number = None if place is None else frame.numbers[place]
            if number is not None:
                param = self.owner.param(number)
                shape = tuple(getattr(param, "ds_shape", param.shape))
                _check(node, shape)
                numel = getattr(param, "ds_numel", param.numel())
                managed.params[node.name] = GraphParam(param, numel, param.dtype)
                managed.ds_ids[node.name] = number
        if bwd:
            managed.grads = {
                place: number
                for place, number in enumerate(frame.numbers)
                if number is not None and self.owner.reduces(number)
            }


def _place_of(name: str) -> int | None:
    """The place among the frame's inputs of a graph's input."""
    match = _PRIMAL.match(name)
    if match is None:
        return None
    return int(match[1]) - 1 if match[1] else int(match[2])


def _check(node: Any, shape: tuple[int, ...]) -> None:
    value = fx.get_node_shape_meta(node)
    if value is not None and tuple(value.shape) != shape:
        raise RuntimeError(
            explain(
                "DeepCompile lost track of which of a graph's inputs is which parameter",
                got=f"shape {tuple(value.shape)} at {node.name}",
                expected=f"shape {shape}",
                fix="set compile.deepcompile to false",
            )
        )


def _handed_over(gm: GraphModule) -> int:
    """How many gradients a graph hands over."""
    return len(list(fx.nodes_calling(gm.graph, torch.ops.dc.reduce_grad.default)))


def _no_inputs() -> tuple[()]:
    """Passes of callers may ask for inputs to run a graph with; sizes are known without."""
    return ()


def _boxed(gm: GraphModule, frees_inputs: bool) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func

    if not frees_inputs:
        return make_boxed_func(gm.forward)
    interpreter = torch.fx.Interpreter(gm)

    def run(args: list[Any]) -> Any:
        return interpreter.boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def warn_fall_back(why: str) -> None:
    """Say that plain torch.compile is used."""
    logger.warning(f"compile.deepcompile: {why}; torch.compile is used without ZeRO's passes")
