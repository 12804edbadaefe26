# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: each maps a count of finished optimizer steps to the rate of the next.

The engine steps the optimizer first and the schedule after it. A schedule therefore sets its first
rate when it is built, and `step()` number t (from 0) sets the rate of optimizer step t + 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from deepspeed.runtime.lr_schedule_options import *  # noqa: F403 - their public home is here
from deepspeed.runtime.lr_schedule_options import (
    CYCLE_FIRST_STEP_SIZE,
    CYCLE_MAX_LR,
    CYCLE_MAX_MOM,
    CYCLE_MIN_LR,
    CYCLE_MIN_MOM,
    CYCLE_SECOND_STEP_SIZE,
    LR_RANGE_TEST_MIN_LR,
    LR_RANGE_TEST_STEP_SIZE,
    WARMUP_LINEAR_RATE,
    WARMUP_LOG_RATE,
    WARMUP_MAX_LR,
    WARMUP_MIN_LR,
    WARMUP_NUM_STEPS,
    WARMUP_TYPE,
)
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

# The second beta while OneCycle drives the momentum, whatever the optimizer was built with.
_CYCLE_SECOND_BETA = 0.99

# - Optimizer access


def get_torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer itself, or the one inside DeepSpeed wrappers (their `.optimizer`).

    Raises:
        TypeError: there is none inside.
    """
    inner = optimizer
    while not isinstance(inner, Optimizer):
        if not hasattr(inner, "optimizer") or inner.optimizer is inner:
            raise TypeError(
                f"{type(optimizer).__name__} is not a subclass of torch.optim.Optimizer"
            )
        inner = inner.optimizer
    return inner


def update_lr(param_groups: Sequence[dict], lrs: Sequence[float]) -> list[float]:
    """Set the rate of each group, in place where it is a tensor; returns the rates as floats."""
    for group, lr in zip(param_groups, lrs, strict=True):
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(float(lr))
        else:
            group["lr"] = lr
    return [float(lr) for lr in lrs]


def _per_group(optimizer: Optimizer, value: Any, name: str) -> list[float]:
    """One float a param group, from a number or from a list of as many."""
    count = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [float(value)] * count
    if len(value) != count:
        raise ValueError(
            explain(
                f"expected {count} {name} (one for each param group), got {len(value)}",
                fix=f"Give {name} {count} values, or one number for all groups.",
            )
        )
    return [float(v) for v in value]


def _whole_steps(value: Any, name: str, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        wanted = "a positive integer" if minimum == 1 else "a non-negative integer"
        raise ValueError(
            explain(
                f"{name} must be {wanted}, got {value}",
                fix=f"Correct {name} in the params of the scheduler section.",
            )
        )
    return value


class _Schedule:
    """What all schedules share: the count of steps, and rates written into the param groups.

    `last_batch_iteration` is t: -1 before the first `step()`, then 0, 1, 2, ...
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        self.optimizer = get_torch_optimizer(optimizer)
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    def _set_first_lr(self) -> None:
        """Write the rate of the first optimizer step, unless training is being resumed."""
        if self.last_batch_iteration == -1:
            self._last_lr = update_lr(self.optimizer.param_groups, self.get_lr())

    def get_lr(self) -> list[float]:
        """The rate of each param group at `last_batch_iteration`."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The rates that this schedule set last.

        Raises:
            AssertionError: it has set none yet.
        """
        if self._last_lr is None:
            raise AssertionError("need to call step() first")
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go one step on (or to the given one) and set the rate of each param group."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._last_lr = update_lr(self.optimizer.param_groups, self.get_lr())

    def state_dict(self) -> dict[str, int]:
        """`{"last_batch_iteration": t}`; all else comes from the constructor."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: Mapping[str, int]) -> None:
        """Continue from a saved t. Group rates stay: the optimizer's checkpoint brings its own."""
        self.last_batch_iteration = sd["last_batch_iteration"]
        self._last_lr = self.get_lr()


class LRRangeTest(_Schedule):
    """Rates that grow without end from `lr_range_test_min_lr`, to find where training breaks.

    With f = (t + 1) / step_size the rate is min_lr * (1 + step_rate * f); staircase floors f.

    Args:
        optimizer: torch optimizer, or a DeepSpeed wrapper around one.
        lr_range_test_min_lr: first rate; a number or one for each param group.
        lr_range_test_step_size: steps in one interval.
        lr_range_test_step_rate: growth per interval, as a share of the first rate.
        lr_range_test_staircase: grow at the end of an interval instead of at each step.
        last_batch_iteration: t to resume from; -1 starts anew.

    Raises:
        ValueError: the step size is no positive integer, or a list has the wrong length.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: float | list[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = _per_group(self.optimizer, lr_range_test_min_lr, LR_RANGE_TEST_MIN_LR)
        self.step_size = _whole_steps(lr_range_test_step_size, LR_RANGE_TEST_STEP_SIZE, 1)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        self._set_first_lr()

    def get_lr(self) -> list[float]:
        """The rate of each param group at `last_batch_iteration`."""
        intervals = (self.last_batch_iteration + 1) / self.step_size
        if self.staircase:
            intervals = math.floor(intervals)
        return [lr * (1 + self.step_rate * intervals) for lr in self.min_lr]


class OneCycle(_Schedule):
    """One triangle of rates, up and down again, then a slow decay; momentum mirrors it.

    The rate climbs from min to max over `cycle_first_step_size` steps, falls back over
    `cycle_second_step_size`, then is min / (1 + decay_lr_rate * k / decay_step_size) in the k-th
    step after the cycle (constant when decay_step_size is 0). With `cycle_momentum`, `betas[0]`
    goes from max_mom to min_mom and back, then grows by decay_mom_rate per interval; `betas[1]`
    becomes 0.99. A group without `betas` keeps its momentum.

    Args:
        optimizer: torch optimizer, or a DeepSpeed wrapper around one.
        cycle_min_lr: rate at both ends of the cycle; a number or one for each param group.
        cycle_max_lr: rate at the peak; a number or one for each param group.
        decay_lr_rate: decay of the rate per decay interval.
        cycle_first_step_size: steps of the rising half.
        cycle_second_step_size: steps of the falling half, 0 for none; None: as the rising half.
        cycle_first_stair_count: stairs of the rising half; 0 or negative: a smooth slope.
        cycle_second_stair_count: stairs of the falling half; None or negative: as the rising half.
        decay_step_size: steps in one decay interval.
        cycle_momentum: drive `betas` as well.
        cycle_min_mom: `betas[0]` at the peak of the rate; a number or one for each param group.
        cycle_max_mom: `betas[0]` at both ends of the cycle; a number or one for each param group.
        decay_mom_rate: growth of `betas[0]` per decay interval.
        last_batch_iteration: t to resume from; -1 starts anew.

    Raises:
        ValueError: no steps in the rising half, fewer than none in the falling one, or a list of the wrong length.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: float | list[float],
        cycle_max_lr: float | list[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | list[float] = 0.8,
        cycle_max_mom: float | list[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if cycle_second_step_size is None:
            cycle_second_step_size = cycle_first_step_size
        if cycle_second_stair_count is None or cycle_second_stair_count < 0:
            cycle_second_stair_count = cycle_first_stair_count
        if cycle_first_step_size <= 0 or cycle_second_step_size < 0:
            raise ValueError(
                explain(
                    "OneCycle's halves have too few steps",
                    got=f"{CYCLE_FIRST_STEP_SIZE}={cycle_first_step_size}, "
                    f"{CYCLE_SECOND_STEP_SIZE}={cycle_second_step_size}",
                    expected="at least one step in the rising half, and none or more in the falling one",
                )
            )
        self.first_step_size = cycle_first_step_size
        self.second_step_size = cycle_second_step_size
        self.total_size = cycle_first_step_size + cycle_second_step_size
        self.step_ratio = cycle_first_step_size / self.total_size
        self.first_stair_count = cycle_first_stair_count
        self.second_stair_count = cycle_second_stair_count
        self.decay_step_size = decay_step_size
        self.decay_lr_rate = decay_lr_rate
        self.decay_mom_rate = decay_mom_rate
        self.min_lrs = _per_group(self.optimizer, cycle_min_lr, CYCLE_MIN_LR)
        self.max_lrs = _per_group(self.optimizer, cycle_max_lr, CYCLE_MAX_LR)
        self._min_moms = _per_group(self.optimizer, cycle_min_mom, CYCLE_MIN_MOM)
        self._max_moms = _per_group(self.optimizer, cycle_max_mom, CYCLE_MAX_MOM)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum and not any("betas" in g for g in self.optimizer.param_groups):
            logger.warning(
                f"OneCycle: {type(self.optimizer).__name__} has no betas: momentum is not cycled"
            )
            self.cycle_momentum = False
        if last_batch_iteration == -1:
            update_lr(self.optimizer.param_groups, self.min_lrs)
            self._set_momentum(self._min_moms)

    def _set_momentum(self, moms: list[float]) -> None:
        if not self.cycle_momentum:
            return
        for group, mom in zip(self.optimizer.param_groups, moms, strict=True):
            if "betas" in group:
                group["betas"] = (mom, _CYCLE_SECOND_BETA)

    def _height(self) -> float:
        """Height in the triangle: 0 at the ends of the cycle, 1 at its peak."""
        at = (self.last_batch_iteration + 1) % self.total_size
        if at <= self.first_step_size:
            done, size, stairs = at, self.first_step_size, self.first_stair_count
        else:
            done, size = self.total_size - at, self.second_step_size
            stairs = self.second_stair_count
        if stairs > 0:
            # Multiplied before it is divided, so that the edge of a stair is met exactly.
            return math.floor(done * stairs / size) / stairs
        return done / size if size else 0.0

    def _decay_intervals(self) -> float:
        if self.decay_step_size == 0:
            return 0.0
        return (self.last_batch_iteration - self.total_size + 1) / self.decay_step_size

    def get_lr(self) -> list[float]:
        """The rate of each param group at `last_batch_iteration`."""
        if self.last_batch_iteration < self.total_size:
            height = self._height()
            pairs = zip(self.min_lrs, self.max_lrs, strict=True)
            return [low + (high - low) * height for low, high in pairs]
        decay = 1 + self.decay_lr_rate * self._decay_intervals()
        return [low / decay for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each param group at `last_batch_iteration`; None without momentum."""
        if not self.cycle_momentum:
            return None
        if self.last_batch_iteration < self.total_size:
            height = self._height()
            pairs = zip(self._min_moms, self._max_moms, strict=True)
            moms = [high - (high - low) * height for low, high in pairs]
        else:
            growth = 1 + self.decay_mom_rate * self._decay_intervals()
            moms = [high * growth for high in self._max_moms]
        return [(mom, _CYCLE_SECOND_BETA) for mom in moms]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go one step on (or to the given one) and set rate and betas of each param group."""
        super().step(last_batch_iteration)
        moms = self.get_mom()
        if moms is not None:
            self._set_momentum([mom for mom, _ in moms])


class _Warmup:
    """The share g(t) in [0, 1] of a warm-up of n steps: ln(t+1)/ln(n), or t/n when linear.

    n = 1 counts as 2 (the logarithm needs it, and then both shapes agree); n = 0 is no warm-up.
    """

    def __init__(self, num_steps: int, kind: str) -> None:
        steps = _whole_steps(num_steps, WARMUP_NUM_STEPS, 0)
        self.num_steps = max(2, steps) if steps else 0
        if kind not in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
            logger.warning(
                f"unknown {WARMUP_TYPE} {kind!r}: using {WARMUP_LOG_RATE!r} "
                f"(known: {WARMUP_LOG_RATE}, {WARMUP_LINEAR_RATE})"
            )
            kind = WARMUP_LOG_RATE
        self.kind = kind

    def going_on(self, t: int) -> bool:
        return max(0, t) < self.num_steps

    def share(self, t: int) -> float:
        if self.kind == WARMUP_LOG_RATE:
            return math.log(t + 1) / math.log(self.num_steps)
        return t / self.num_steps


class WarmupLR(_Schedule):
    """Rates that rise from min to max over `warmup_num_steps` steps and stay there.

    Args:
        optimizer: torch optimizer, or a DeepSpeed wrapper around one.
        warmup_min_lr: first rate; a number or one for each param group.
        warmup_max_lr: last rate; a number, one for each param group, or None for the group's own.
        warmup_num_steps: steps of the warm-up; 0 starts at the last rate.
        warmup_type: "log" or "linear"; another word warns and means "log".
        last_batch_iteration: t to resume from; -1 starts anew.

    Raises:
        ValueError: warmup_num_steps is no non-negative integer, or a list has the wrong length.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.min_lrs = _per_group(self.optimizer, warmup_min_lr, WARMUP_MIN_LR)
        self.max_lrs = _per_group(self.optimizer, warmup_max_lr, WARMUP_MAX_LR)
        self.delta_lrs = [high - low for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        self._warmup = _Warmup(warmup_num_steps, warmup_type)
        self.warmup_num_steps = self._warmup.num_steps
        self.warmup_type = self._warmup.kind
        self._set_first_lr()

    def _get_gamma(self) -> float:
        """Height between min (0) and max (1) at `last_batch_iteration`."""
        t = self.last_batch_iteration
        if not self._warmup.going_on(t):
            return self._after_warmup(t)
        return self._warmup.share(max(0, t))

    def _after_warmup(self, t: int) -> float:
        return 1.0

    def get_lr(self) -> list[float]:
        """The rate of each param group at `last_batch_iteration`."""
        gamma = self._get_gamma()
        pairs = zip(self.min_lrs, self.delta_lrs, strict=True)
        return [low + delta * gamma for low, delta in pairs]


class WarmupDecayLR(WarmupLR):
    """Rates that rise as WarmupLR's and then fall along a line, to min at `total_num_steps`.

    Args:
        optimizer: torch optimizer, or a DeepSpeed wrapper around one.
        total_num_steps: steps of the whole training.
        warmup_min_lr: first and last rate; a number or one for each param group.
        warmup_max_lr: highest rate, in the same way; None for the group's own.
        warmup_num_steps: steps of the warm-up; 0 starts at the highest rate.
        warmup_type: "log" or "linear"; another word warns and means "log".
        last_batch_iteration: t to resume from; -1 starts anew.

    Raises:
        ValueError: warmup_num_steps is no non-negative integer, or a list has the wrong length.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        super().__init__(
            optimizer,
            warmup_min_lr,
            warmup_max_lr,
            warmup_num_steps,
            warmup_type,
            last_batch_iteration,
        )
        _warn_if_all_warmup(self.total_num_steps, self.warmup_num_steps)

    def _after_warmup(self, t: int) -> float:
        fall = max(1.0, self.total_num_steps - self.warmup_num_steps)
        return min(1.0, max(0.0, (self.total_num_steps - t) / fall))


class WarmupCosineLR(_Schedule):
    """The optimizer's own rates times a ratio: a warm-up to 1, then half a cosine down.

    Args:
        optimizer: torch optimizer, or a DeepSpeed wrapper around one.
        total_num_steps: steps of the whole training.
        warmup_min_ratio: ratio at t = 0 of the warm-up.
        warmup_num_steps: steps of the warm-up; 0 starts at ratio 1.
        cos_min_ratio: ratio at `total_num_steps` and after.
        warmup_type: "log" or "linear"; another word warns and means "log".
        last_batch_iteration: t to resume from; -1 starts anew.

    Raises:
        ValueError: warmup_num_steps is no non-negative integer.
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = WARMUP_LOG_RATE,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self._warmup = _Warmup(warmup_num_steps, warmup_type)
        self.warmup_num_steps = self._warmup.num_steps
        self.warmup_type = self._warmup.kind
        _warn_if_all_warmup(self.total_num_steps, self.warmup_num_steps)
        self.org_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._set_first_lr()

    def get_lr_ratio(self) -> float:
        """The ratio at `last_batch_iteration`; 0 before the first step of a warm-up."""
        t = self.last_batch_iteration
        if self._warmup.going_on(t):
            if t < 0:
                return 0.0
            low = self.warmup_min_ratio
            return low + (1.0 - low) * self._warmup.share(t)
        decay_steps = max(1, self.total_num_steps - self.warmup_num_steps)
        done = min(1.0, (t - self.warmup_num_steps + 1) / decay_steps)
        low = self.cos_min_ratio
        return low + (1.0 - low) * (1.0 + math.cos(math.pi * done)) / 2

    def get_lr(self) -> list[float]:
        """The rate of each param group at `last_batch_iteration`."""
        ratio = self.get_lr_ratio()
        return [lr * ratio for lr in self.org_lrs]


def _warn_if_all_warmup(total: int, warmup: int) -> None:
    if total < warmup:
        logger.warning(f"total_num_steps {total} is less than warmup_num_steps {warmup}")
