# SPDX-License-Identifier: Apache-2.0
"""SuperOffload: a thread steps each part as soon as its gradients are there, and the step only has to agree.

[Note: Steps on trial]
Before the norm of all gradients is known nobody can say whether they will be clipped, or overflowed. A part is stepped
all the same, as if they were not; what it was before is kept beside it. The step compares: where the factor on the
gradients, the options of the group or the gradients themselves turn out otherwise, the parts are put back as they were,
bit for bit, and stepped again. Parameters get the new weights after that comparison only, so a backward pass under way
never sees them. After a step that was clipped or skipped nothing is tried, until one passes again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.ops.elementwise import ElementwiseOptimizer
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.numa import available_cores

from ..zero.host_worker import HostWorker
from ..zero.plan import TierKind
from ..zero.shard_group import ShardGroup, ShardPart
from ..zero.step_order import StepOrder

if TYPE_CHECKING:
    from ..zero.optimizer import ZeroOptimizer


@dataclass
class Trial:
    """A part that is stepped ahead.

    Attributes:
        arrived: starts of the runs whose gradients came in this pass.
        missing: elements whose gradients did not.
        running: the thread's step; None if there is none.
        scale, options: by which it steps.
        before: copies of master and states, filled before each step and used again.
        numbers: the states that are numbers, as they were.
    """

    group: ShardGroup
    part: ShardPart
    arrived: set[int] = field(default_factory=set)
    missing: int = 0
    running: Future[Any] | None = None
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


class SuperOffload(StepOrder):
    """The order of SuperOffload (arXiv:2509.21271).

    Args:
        owner: an optimizer whose states are in host memory, apart from the parameters, with a rule of one flat shard.
        at_boundary: whether the backward pass that begins completes an accumulation.
        cores_share: of the processor's cores, for the thread's kernels.

    Attributes:
        tried, agreed: parts that were stepped ahead, and those whose step counted.

    Raises:
        DeepSpeedConfigError: another place of states, or another rule.
    """

    def __init__(
        self, owner: ZeroOptimizer, at_boundary: Callable[[], bool], cores_share: float
    ) -> None:
        super().__init__(owner)
        _check(owner)
        self.at_boundary = at_boundary
        self.worker = HostWorker(int(cores_share * len(available_cores())))
        on_host = ((g, p) for g, p in owner._parts() if p.tier.device.type == "cpu")
        self.trials = {id(part): Trial(group, part) for group, part in on_host}
        self.tried = self.agreed = 0
        self._confident = True
        self._trying = self._spoiled = False
        for group in owner.groups:
            # What replicas still sum in place is not complete when it is stored.
            if group.shard_axis.size > 1 or group.replica_axis.size == 1:
                group.on_stored = self._on_stored
            group.on_edit = self.drop

    # - during the backward pass

    def begin_backward(self) -> None:
        """Try only what completes an accumulation, and only its first pass."""
        if any(trial.running is not None for trial in self.trials.values()):
            self.drop()
        ready = self._confident and not self._spoiled and self.fused_rule() is not None
        self._trying = ready and self.at_boundary()
        for trial in self.trials.values():
            trial.arrived.clear()
            trial.missing = trial.part.length

    def _on_stored(self, part: ShardPart, start: int, length: int) -> None:
        trial = self.trials.get(id(part))
        if trial is None or not self._trying:
            return
        if trial.running is not None:  # a gradient in instalments
            self.drop()
            return
        if start not in trial.arrived:
            trial.arrived.add(start)
            trial.missing -= length
        if trial.missing == 0:
            self._try(trial)

    def _try(self, trial: Trial) -> None:
        trial.scale = 1.0 / self.owner.loss_scale
        trial.options = self.options_now(trial.group)
        self.tried += 1
        trial.running = self.worker.start(self._step_on_trial, trial, trial.part.held_grad)

    def _step_on_trial(self, trial: Trial, grad: torch.Tensor) -> None:
        """Keep what the part is, and step it; in the thread."""
        part, inner = trial.part, self.owner.optimizer
        state = inner.state[part.master]
        trial.numbers = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
        for name, value in (("", part.master.data), *state.items()):
            if isinstance(value, torch.Tensor):
                if name not in trial.before:
                    trial.before[name] = torch.empty_like(value)
                trial.before[name].copy_(value)
        inner.step_shard(trial.options, part.master, grad, None, trial.scale)  # type: ignore[attr-defined]

    # - the verdict

    def step(self, grad_scale: float) -> None:
        """Keep the steps on trial if they were the right ones, and make those that are missing."""
        trials = [trial for trial in self.trials.values() if trial.running is not None]
        right = all(
            t.scale == grad_scale and t.options == self.options_now(t.group) for t in trials
        )
        if right:
            for trial in trials:
                self._wait(trial)
                trial.group.lower(trial.part)
            self.agreed += len(trials)
        else:
            self._put_back()
        done = {id(trial.part) for trial in trials} if right else set()
        self.step_parts((p for p in self.owner._parts() if id(p[1]) not in done), grad_scale)
        self._confident = grad_scale == 1.0 / self.owner.loss_scale
        self._trying = self._spoiled = False

    def drop(self) -> None:
        """Put back what was tried, and try no more before the next step."""
        self._put_back()
        self._trying, self._spoiled = False, True

    def forget(self) -> None:
        """Put back what was tried: there will be no step."""
        self._put_back()
        self._trying = self._spoiled = self._confident = False

    @staticmethod
    def _wait(trial: Trial) -> None:
        running, trial.running = trial.running, None
        if running is not None:
            running.result()

    def _put_back(self) -> None:
        inner = self.owner.optimizer
        for trial in self.trials.values():
            if trial.running is None:
                continue
            self._wait(trial)
            master = trial.part.master
            master.data.copy_(trial.before[""])
            if not trial.numbers:  # its first step made the states
                inner.state.pop(master, None)
                continue
            state = inner.state[master]
            state.update(trial.numbers)
            for name, value in trial.before.items():
                if name:
                    state[name].copy_(value)

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Extent in which nothing is on trial."""
        if any(trial.running is not None for trial in self.trials.values()):
            self.drop()
        yield

    def close(self) -> None:
        """Wait for the thread, and end it."""
        for group in self.owner.groups:
            group.on_stored = group.on_edit = None
        self.worker.close()


def _check(owner: ZeroOptimizer) -> None:
    inner = owner.optimizer
    repeatable = isinstance(inner, ElementwiseOptimizer) and not getattr(
        inner, "stochastic_rounding", False
    )
    if owner.plan.state_tier is not TierKind.HOST or not repeatable:
        raise DeepSpeedConfigError(
            explain(
                "SuperOffload steps in host memory, by an optimizer that was made for it",
                got=f"states in {owner.plan.state_tier.value} memory, {type(owner.optimizer).__name__}",
                expected="offload_optimizer.device cpu, and an optimizer of deepspeed.ops such as DeepSpeedCPUAdam",
                fix="change the two, or set 'offload_optimizer.super_offload' to false",
            )
        )
