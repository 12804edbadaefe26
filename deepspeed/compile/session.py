# SPDX-License-Identifier: Apache-2.0
"""DeepCompile on one engine: which passes run when, and what changes around the graphs.

[Note: Schedule]
A schedule is a list of `(global step, passes)`. At the first forward pass of such a step everything is traced anew, from
the module, and the step's passes are run on what comes out. The default gathers and looks ahead from the beginning, and
keeps more parameters whole from step `WARMUP` on, when the memory of a whole step is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from deepspeed.runtime.zero.residency import WatchedParams
from deepspeed.utils.errors import explain

from .backend import BACKENDS, DeepCompileBackend, warn_fall_back
from .graph_ops import define_ops
from .graph_params import GraphParams
from .init_tp import start_autotp
from .passes import (
    offload_adam_states,
    offload_parameters,
    prefetch,
    selective_gather,
    zero3_compile,
    zero_1_and_2_compile,
)
from .passes.contract import PassContract, register_pass_contract, validate_schedule
from .util import (
    MIN_TORCH,
    MIN_TORCH_INDUCTOR,
    is_deepcompile_supported,
    is_inductor_supported,
)

WARMUP = 5
Schedule = list[tuple[int, list[Any]]]

opt_passes: dict[str, Callable[..., Any]] = {}


def register_compile_pass(
    name: str, opt_pass_fn: Callable[..., Any], contract: PassContract | None = None
) -> None:
    """Make a pass known by a name, for schedules.

    Args:
        name: what schedules call it.
        opt_pass_fn: edits a graph in place; see deepspeed/compile/passes.
        contract: what it needs of other passes.
    """
    opt_passes[name] = opt_pass_fn
    register_pass_contract(name, contract)


def _register_own() -> None:
    # Each a function of its own, however alike: schedules may name a pass by its function.
    z1, adam = zero_1_and_2_compile, offload_adam_states
    for name, function, contract in (
        (z1.NAME_Z1, z1.add_z1_reduce, z1.CONTRACT_Z1),
        (z1.NAME_Z2, z1.add_z2_reduce, z1.CONTRACT_Z2),
        (zero3_compile.NAME, zero3_compile.add_z3_gather_release, zero3_compile.CONTRACT),
        (prefetch.NAME, prefetch.schedule_prefetch, prefetch.CONTRACT),
        (selective_gather.NAME, selective_gather.selective_gather, selective_gather.CONTRACT),
        (
            offload_parameters.NAME,
            offload_parameters.offload_parameter_fwd,
            offload_parameters.CONTRACT,
        ),
        (adam.NAME, adam.move_opt_states, adam.CONTRACT),
        (adam.NAME_SYNC, adam.move_opt_states_sync, adam.CONTRACT_SYNC),
        (adam.NAME_FOR_INIT, adam.offload_adam_states_for_init, adam.CONTRACT_FOR_INIT),
    ):
        if name not in opt_passes:
            register_compile_pass(name, function, contract)


def default_schedule(stage: int) -> Schedule:
    """The passes of a ZeRO stage."""
    if stage < 3:
        return [(0, [zero_1_and_2_compile.NAME_Z1 if stage == 1 else zero_1_and_2_compile.NAME_Z2])]
    ahead = [zero3_compile.NAME, prefetch.NAME]
    return [(0, ahead), (WARMUP, [*ahead, selective_gather.NAME])]


def why_not(engine: Any, backend: str) -> str | None:
    """Why DeepCompile cannot serve an engine; None if it can."""
    if not is_deepcompile_supported():
        return f"needs torch >= {MIN_TORCH}, this is {torch.__version__}"
    if backend not in BACKENDS:
        return f"backend {backend!r} is not one of {', '.join(BACKENDS)}"
    if backend == "inductor" and not is_inductor_supported():
        return (
            f"backend 'inductor' needs torch >= {MIN_TORCH_INDUCTOR}, this is {torch.__version__}"
            " (backend 'eager' does not)"
        )
    if engine.plan.stage == 0:
        return "ZeRO stage 0 leaves nothing to do for it"
    if not hasattr(engine.optimizer, "reducer"):
        return "the engine has no ZeRO optimizer"
    if engine.residency is not None and any(hasattr(m, "_z3_leaf") for m in engine.modules()):
        return "leaf modules of ZeRO-3 choose at run time what they compute with"
    return None


class DeepCompile:
    """What `engine.compile()` starts where `compile.deepcompile` asks for it.

    Args:
        engine: an engine of stage 1 to 3.
        kind: "inductor" or "eager".
        schedule: see [Note: Schedule]; None is that of the stage.

    Raises:
        PassContractError: if the schedule breaks a contract.
        KeyError: if it names a pass that nobody registered.
    """

    def __init__(self, engine: Any, kind: str, schedule: Schedule | None = None) -> None:
        define_ops()
        _register_own()
        chosen = default_schedule(engine.plan.stage) if schedule is None else schedule
        validate_schedule(chosen, opt_passes)
        self._schedule = sorted(((step, _functions(p)) for step, p in chosen), key=lambda s: s[0])
        self._residency = engine.residency
        self.params = GraphParams(
            engine.module.parameters(),
            engine.optimizer.reducer,
            engine.residency,
            engine.watch.share_of,
            engine._config.compile_config,
        )
        policy = None if engine.residency is None else engine.residency.policy
        self.backend = DeepCompileBackend(
            kind,
            self.params,
            engine._config.compile_config,
            0 if policy is None else policy.prefetch_numel,
            0 if policy is None else policy.max_live_numel,
        )
        self._whole = 0 if engine.residency is None else len(engine.residency.persistent)
        if engine.residency is not None:
            _keep_reads_eager()
            engine.residency.release_all()
            engine.residency.leave_to_graphs(self.params)

    @contextlib.contextmanager
    def forward(self, step: int) -> Iterator[None]:
        """The extent of an engine's forward pass in a global step."""
        self._take_passes(step)
        if self._residency is None:
            yield
            return
        with self._residency.around_graphs():
            yield

    def _take_passes(self, step: int) -> None:
        due = [passes for at, passes in self._schedule if at <= step]
        changed = self._residency is not None and len(self._residency.persistent) != self._whole
        if self._residency is not None:
            self._whole = len(self._residency.persistent)
        if not due and not changed:
            return
        if due:
            self._schedule = [entry for entry in self._schedule if entry[0] > step]
            self.backend.passes = due[-1]
        if self.backend.graph_order:
            self.backend.forget_graphs()
            torch._dynamo.reset()

    @property
    def times(self) -> list[tuple[int, float]]:
        """For each graph its number and the seconds that compiling took."""
        return list(self.backend.times)

    def stop(self) -> None:
        """Go back to module hooks; graphs that hand gradients to this engine are not used again."""
        self.backend.passes = []
        if self.backend.graph_order:
            self.backend.forget_graphs()
            torch._dynamo.reset()
        if self._residency is not None:
            self._residency.take_from_graphs()


def _keep_reads_eager() -> None:
    """Have the compiler leave the function alone that sees reads of parameters: it asks whether somebody is compiling.

    Tracing runs it as it is. By itself, called from code that could not be compiled, it would become a graph in which the
    answer is always yes.
    """
    from torch._dynamo.eval_frame import skip_code

    skip_code(WatchedParams.__getitem__.__code__)


def _functions(passes: Iterable[Any]) -> list[Callable[..., Any]]:
    return [opt_passes[each] if isinstance(each, str) else each for each in passes]


class DividedLayers:
    """What stands in for `DeepCompile` where only the collectives of divided layers are in the graphs.

    Attributes:
        backend: None: the caller's.
    """

    backend = None

    @property
    def times(self) -> list[tuple[int, float]]:
        """Nothing is measured."""
        return []

    def forward(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Nothing is around the graphs."""
        return contextlib.nullcontext()

    def stop(self) -> None:
        """Nothing is to be undone: the operators work in code that is not compiled, too."""


def _check_stage(engine: Any, passes: Iterable[str]) -> None:
    fitting = {1: {"z1"}, 2: {"z1"}, 3: {"z3"}}.get(engine.plan.stage, set())
    if wrong := sorted({"z1", "z3"} & set(passes) - fitting):
        raise ValueError(
            explain(
                "compile.passes names a pass of another ZeRO stage",
                got=f"{wrong} at stage {engine.plan.stage}",
                expected=str(sorted(fitting)),
                fix="remove compile.passes: the pass of the stage is chosen by itself",
            )
        )


def start(
    engine: Any, backend: str, schedule: Schedule | None
) -> DeepCompile | DividedLayers | None:
    """Start DeepCompile on an engine; None, with a warning, where it falls back to plain torch.compile.

    Raises:
        NotImplementedError: for passes that do not go together.
        ValueError: if `compile.passes` is for another ZeRO stage.
    """
    passes = engine._config.compile_config.passes or []
    if "autotp" in passes:
        if schedule is not None:
            raise NotImplementedError(
                explain(
                    "the compile pass autotp takes no schedule",
                    got="compile(schedule=...)",
                    fix="leave the schedule out, or 'autotp' out of compile.passes",
                )
            )
        start_autotp(engine)
        return DividedLayers()
    _check_stage(engine, passes)
    reason = why_not(engine, backend)
    if reason is not None:
        warn_fall_back(reason)
        return None
    return DeepCompile(engine, backend, schedule)
