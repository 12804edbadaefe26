# SPDX-License-Identifier: Apache-2.0
"""The section ``zero_optimization.zenflow`` as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspeed.utils.errors import DeepSpeedConfigError, explain

# Updates of the rest between two choices, where the configuration leaves that to us.
AUTO_CHOICE_UPDATES = 4
# Gradients of the rest wait for so many steps at most, where the configuration leaves that to us.
AUTO_LONGEST_WAIT = 16
# Steps in which columns are never chosen again.
NEVER = 2**62


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does; see the section's fields for the words.

    Attributes:
        topk_ratio: share of each matrix's columns that is stepped at once.
        update_every: steps between updates of the rest; 0 decides by the norms.
        choose_every: steps after which columns are chosen anew, at the next update.
        choose_updates: updates after which they are, where no number of steps is given.
        warm_up: ordinary steps at the start.
        overlap: the host steps the rest beside the next steps.
        offload: the chosen columns are stepped on the host, too.
        auto_ratio: with `update_every` 0, the share of the chosen columns' gradients that the rest's may reach.
        reserved: share of the cores that the host's step leaves alone.
    """

    topk_ratio: float
    update_every: int
    choose_every: int
    choose_updates: int
    warm_up: int
    overlap: bool
    offload: bool
    auto_ratio: float
    reserved: float

    @classmethod
    def of(cls, section: Any, steps_per_epoch: int | None) -> Settings:
        """Read the parsed section.

        Args:
            section: `zero_optimization.zenflow`.
            steps_per_epoch: optimizer steps to an epoch, as far as the engine knows.

        Raises:
            DeepSpeedConfigError: an interval below 1, or a negative number of warm-up steps.
        """
        for key in ("update_interval", "select_interval"):
            value = getattr(section, key)
            if value != "auto" and value < 1:
                raise _unfit(key, value, 'a number of 1 and above, or "auto"')
        if section.full_warm_up_rounds < 0:
            raise _unfit("full_warm_up_rounds", section.full_warm_up_rounds, "0 or more")
        every, updates = _choices(section, section.steps_per_epoch or steps_per_epoch)
        return cls(
            topk_ratio=section.topk_ratio,
            update_every=0 if section.update_interval == "auto" else section.update_interval,
            choose_every=every,
            choose_updates=updates,
            warm_up=section.full_warm_up_rounds,
            overlap=section.overlap_step,
            offload=section.offload,
            auto_ratio=section.auto_ratio,
            reserved=section.pt_reserved_cores_perc,
        )


def _choices(section: Any, steps_per_epoch: int | None) -> tuple[int, int]:
    """After how many steps, or else after how many updates, columns are chosen anew."""
    interval = section.select_interval
    if section.select_strategy == "epoch":
        if not steps_per_epoch:
            # Without a loader of the engine's nobody knows when an epoch ends.
            return NEVER, NEVER
        return steps_per_epoch * (1 if interval == "auto" else interval), NEVER
    return (NEVER, AUTO_CHOICE_UPDATES) if interval == "auto" else (interval, NEVER)


def _unfit(key: str, got: Any, expected: str) -> DeepSpeedConfigError:
    return DeepSpeedConfigError(
        explain(f"'zero_optimization.zenflow.{key}' cannot be", got=got, expected=expected)
    )
