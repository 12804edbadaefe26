# SPDX-License-Identifier: Apache-2.0
"""How difficult the samples of a step may be: a number that grows from easy to hard by a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...utils.errors import explain
from ..config_errors import ConfigAssertionError, ConfigValueError

MIN_DIFFICULTY = "min_difficulty"
MAX_DIFFICULTY = "max_difficulty"
CURRENT_DIFFICULTY = "current_difficulty"
SCHEDULE_TYPE = "schedule_type"
SCHEDULE_CONFIG = "schedule_config"

# schedule -> keys that its schedule_config needs
_NEEDS: dict[str, tuple[str, ...]] = {
    "fixed_discrete": ("difficulty", "max_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "custom": (),
}


class CurriculumScheduler:
    """The difficulty at each step, such as a sequence length.

    ``fixed_linear`` and ``fixed_root`` grow by ``(step / total) ** (1 / degree)`` from the least to the greatest
    difficulty, rounded down to whole steps; ``fixed_discrete`` looks the step up in a list; ``custom`` asks a function.

    Args:
        config: ``min_difficulty``, ``max_difficulty``, ``schedule_type`` and ``schedule_config``.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) a key is missing, or numbers that cannot be.
        ValueError: (as ``ConfigValueError``) an unknown schedule.

    Example:
        >>> growth = {"total_curriculum_step": 4, "difficulty_step": 8}
        >>> schedule = {"schedule_type": "fixed_linear", "schedule_config": growth}
        >>> lengths = CurriculumScheduler({"min_difficulty": 8, "max_difficulty": 64, **schedule})
        >>> [lengths.update_difficulty(step) for step in (1, 2, 3, 4, 5)]
        [16, 32, 48, 64, 64]
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        for key in (MIN_DIFFICULTY, MAX_DIFFICULTY, SCHEDULE_TYPE):
            _need(config, key, "curriculum learning")
        self.state: dict[str, Any] = {
            MIN_DIFFICULTY: config[MIN_DIFFICULTY],
            MAX_DIFFICULTY: config[MAX_DIFFICULTY],
            CURRENT_DIFFICULTY: config[MIN_DIFFICULTY],
            SCHEDULE_TYPE: config[SCHEDULE_TYPE],
            SCHEDULE_CONFIG: dict(config.get(SCHEDULE_CONFIG) or {}),
        }
        self.first_step = True
        self.custom_get_difficulty: Callable[[int], int] | None = None
        self._check()

    def _check(self) -> None:
        kind, schedule = self.state[SCHEDULE_TYPE], self.state[SCHEDULE_CONFIG]
        if kind not in _NEEDS:
            raise ConfigValueError(
                explain("unknown curriculum schedule", got=kind, expected=", ".join(_NEEDS))
            )
        for key in _NEEDS[kind]:
            _need(schedule, key, f"a curriculum of schedule_type {kind!r}")
        problem = None
        if kind == "fixed_discrete":
            levels, steps = schedule["difficulty"], schedule["max_step"]
            if len(levels) != len(steps) + 1 or not steps:
                problem = f"{len(levels)} values of 'difficulty' for {len(steps)} of 'max_step'; one more is needed"
        elif kind != "custom":
            low = [key for key in _NEEDS[kind] if not schedule[key] > 0]
            problem = f"{low[0]!r} is not above 0" if low else None
        if self.state[MIN_DIFFICULTY] > self.state[MAX_DIFFICULTY]:
            problem = "'min_difficulty' is above 'max_difficulty'"
        if problem:
            raise ConfigAssertionError(explain("a curriculum that cannot be", got=problem))

    def get_current_difficulty(self) -> int:
        """The difficulty of the last update."""
        return self.state[CURRENT_DIFFICULTY]

    def set_current_difficulty(self, difficulty: int) -> None:
        """Set the difficulty until the next update."""
        self.state[CURRENT_DIFFICULTY] = difficulty

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], int]) -> None:
        """Give the function of the "custom" schedule: from the step (the first is 1) to the difficulty."""
        self.custom_get_difficulty = schedule_function

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where another scheduler was."""
        self.state = state

    def get_difficulty(self, global_steps: int) -> int:
        """The difficulty of a step; the first is 1.

        Raises:
            RuntimeError: the schedule is "custom" and has no function.
        """
        kind, schedule = self.state[SCHEDULE_TYPE], self.state[SCHEDULE_CONFIG]
        if kind == "fixed_discrete":
            reached = zip(schedule["difficulty"], schedule["max_step"], strict=False)
            passed = (level for level, last in reached if global_steps <= last)
            return next(passed, schedule["difficulty"][-1])
        if kind == "custom":
            if self.custom_get_difficulty is None:
                raise RuntimeError(
                    explain(
                        "the 'custom' curriculum schedule has no function",
                        fix="call set_custom_get_difficulty(function) before training",
                    )
                )
            return self.custom_get_difficulty(global_steps)
        low, high = self.state[MIN_DIFFICULTY], self.state[MAX_DIFFICULTY]
        degree = schedule["root_degree"] if kind == "fixed_root" else 1
        share = (global_steps / schedule["total_curriculum_step"]) ** (1.0 / degree)
        grown = int(share * (high - low) + low)
        grown -= grown % schedule["difficulty_step"]
        return min(grown, high)

    def update_difficulty(self, global_steps: int) -> int:
        """Set and return the difficulty of a step, of which the first is 1; the greatest, once reached, stays."""
        if self.state[CURRENT_DIFFICULTY] < self.state[MAX_DIFFICULTY]:
            self.state[CURRENT_DIFFICULTY] = self.get_difficulty(global_steps)
        return self.state[CURRENT_DIFFICULTY]


def _need(values: Mapping[str, Any], key: str, what: str) -> None:
    if key not in values:
        raise ConfigAssertionError(explain(f"{what} needs {key!r}", got=", ".join(values)))
