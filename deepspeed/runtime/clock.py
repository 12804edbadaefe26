# SPDX-License-Identifier: Apache-2.0
"""Counts micro-batches and steps, and says when a gradient accumulation is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from deepspeed.utils.errors import explain


@dataclass
class AccumulationClock:
    """The counters of a run.

    Attributes:
        accumulation: micro-batches to one optimizer step.
        managed: whether the clock decides on the boundary; if not, every `step()` of the caller is one.
        micro_steps: micro-batches seen.
        global_steps: optimizer steps, skipped ones included.
        global_samples: samples that those steps consumed, over all ranks.
        skipped_steps: steps not taken because gradients overflowed.
        forced_boundary: what the caller fixed the boundary to; None leaves it to the clock.
        applied: whether the last `step()` changed the weights.
    """

    accumulation: int = 1
    managed: bool = True
    micro_steps: int = 0
    global_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0
    forced_boundary: bool | None = None
    applied: bool = False
    stepping: bool = False
    unsynchronized: bool = False
    backwards: int = 0

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-batch completes an accumulation."""
        if self.forced_boundary is not None:
            return self.forced_boundary
        if not self.managed:
            return self.stepping
        return (self.micro_steps + 1) % self.accumulation == 0

    def force_boundary(self, value: bool) -> None:
        """Fix the answer of `at_boundary` until further notice.

        Raises:
            AssertionError: if the caller manages accumulation by itself.
        """
        if not self.managed:
            raise AssertionError(
                explain(
                    "set_gradient_accumulation_boundary has no meaning here",
                    got="managed_gradient_accumulation: false",
                    expected="managed accumulation",
                    fix="call step() at your boundary instead",
                )
            )
        self.forced_boundary = bool(value)

    def share(self) -> float:
        """What a micro-batch's loss counts for in its accumulation."""
        return 1.0 / self.accumulation if self.accumulation > 1 and self.managed else 1.0

    def count_step(self, batch: int, micro_batch: int, overflow: bool) -> None:
        """Count one optimizer step of `batch` samples (unmanaged: `micro_batch`, of all ranks, for every backward)."""
        self.global_steps += 1
        self.global_samples += batch if self.managed else micro_batch * max(1, self.backwards)
        self.skipped_steps += overflow
        self.backwards = 0

    @contextlib.contextmanager
    def inside_step(self) -> Iterator[None]:
        """The extent of one `step()` call.

        Raises:
            AssertionError: inside `no_sync()`, where it would update weights (older accelerate calls it there between
                the boundaries, after every micro-batch).
        """
        if self.unsynchronized and (self.at_boundary or not self.managed):
            raise AssertionError(
                explain(
                    "It is illegal to call Engine.step() inside no_sync context manager",
                    expected="step() after the context has ended",
                    fix="move step() out of the with block",
                )
            )
        self.stepping, self.applied = True, False
        try:
            yield
        finally:
            self.stepping = False
            self.micro_steps += 1

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes inside only add up locally; legal at every stage.

        Raises:
            AssertionError: when entered twice.
        """
        if self.unsynchronized:
            raise AssertionError(
                explain(
                    "no_sync context manager reentry is unsupported",
                    got="no_sync() inside no_sync() or coalesce_grad_reduction()",
                    expected="one no_sync() at a time",
                    fix="leave the outer one first",
                )
            )
        self.unsynchronized = True
        try:
            yield
        finally:
            self.unsynchronized = False


class Counters:
    """The clock's counters as attributes of the engine, settable as checkpoint code and scripts expect."""

    clock: AccumulationClock

    @property
    def global_steps(self) -> int:
        return self.clock.global_steps

    @global_steps.setter
    def global_steps(self, value: int) -> None:
        self.clock.global_steps = value

    @property
    def _is_gradient_accumulation_boundary(self) -> bool | None:
        """What `set_gradient_accumulation_boundary` fixed the boundary to; None leaves it to the count."""
        return self.clock.forced_boundary

    @property
    def global_samples(self) -> int:
        return self.clock.global_samples

    @global_samples.setter
    def global_samples(self, value: int) -> None:
        self.clock.global_samples = value

    @property
    def micro_steps(self) -> int:
        return self.clock.micro_steps

    @micro_steps.setter
    def micro_steps(self, value: int) -> None:
        self.clock.micro_steps = value

    @property
    def skipped_steps(self) -> int:
        return self.clock.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self.clock.skipped_steps = value

    @property
    def gas_boundary_ctr(self) -> int:
        return self.clock.global_steps
