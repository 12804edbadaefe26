# SPDX-License-Identifier: Apache-2.0
"""Learning rates that follow the number of sequences of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from ...config_errors import ConfigValueError


def scale_lr(
    base_batch_size: int, batch_size: int, base_lr: float = 1, method: str | None = "linear"
) -> float:
    """The learning rate of a batch of another size.

    Args:
        base_batch_size: sequences of the batch that `base_lr` is for.
        batch_size: sequences of the batch.
        base_lr: learning rate.
        method: "linear" in the size, "sqrt" of it, or "none" (or None).

    Raises:
        ValueError: an unknown method.

    Example:
        >>> scale_lr(4, 16, 0.1, "sqrt")
        0.2
    """
    ratio = batch_size / base_batch_size
    if method == "linear":
        return base_lr * ratio
    if method == "sqrt":
        return base_lr * math.sqrt(ratio)
    if method is None or method.lower() == "none":
        return base_lr
    raise ConfigValueError(
        explain("Unknown scaling method", got=method, expected="linear, sqrt or none")
    )


class Constant:
    """Stands for a schedule where there is none: the learning rates that the optimizer had."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        # "initial_lr" is where torch's schedules keep it; a second schedule must not start from scaled rates
        self.rates = [
            group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups
        ]

    def step(self, epoch: int | None = None) -> None:
        """Do nothing."""

    def get_last_lr(self) -> list[float]:
        """The learning rates at first."""
        return self.rates

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"rates": list(self.rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the learning rates of another."""
        self.rates = list(state_dict["rates"])


class VariableBatchSizeLR(LRScheduler):
    """Scales the learning rates of another schedule by the number of sequences of each step.

    Args:
        lr_scheduler: the schedule whose rates are for batches of `base_batch_size`.
        base_batch_size: sequences.
        batch_sizes: sequences of each step; after the last one they begin again.
        dataloader: the loader whose steps these are; kept for the caller.
        lr_scaling_method: as in `scale_lr`.
        last_epoch: the step that was last done; -1 for none.
        verbose: log the rates.
    """

    def __init__(
        self,
        lr_scheduler: Any,
        base_batch_size: int,
        batch_sizes: Sequence[int],
        dataloader: Any,
        lr_scaling_method: str | None = "linear",
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.base_lr_scheduler = lr_scheduler
        self.base_batch_size = base_batch_size
        self.batch_sizes = list(batch_sizes)
        self.dataloader = dataloader
        self.lr_scaling_method = lr_scaling_method
        self.verbose = verbose
        self.base_lrs: list[Any] = self.get_last_lr()
        self.last_epoch = last_epoch + 1
        self._apply()

    @property
    def optimizer(self) -> Any:  # type: ignore[override]
        """That of the other schedule."""
        return self.base_lr_scheduler.optimizer

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; the loader is not in it."""
        names = (
            "base_batch_size",
            "lr_scaling_method",
            "batch_sizes",
            "base_lrs",
            "last_epoch",
            "verbose",
        )
        return {
            "base_lr_scheduler": self.base_lr_scheduler.state_dict(),
            **{name: getattr(self, name) for name in names},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one was."""
        for name, value in state_dict.items():
            if name == "base_lr_scheduler":
                self.base_lr_scheduler.load_state_dict(value)
            else:
                setattr(self, name, value)
        self._apply()

    def get_last_lr(self) -> list[Any]:
        """The other schedule's learning rates, not scaled."""
        return list(self.base_lr_scheduler.get_last_lr())

    def get_lr(self) -> list[Any]:
        """The learning rates of this step, scaled."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Set the rates of the next step, or of step `epoch` (the first is 0)."""
        if epoch is None:
            self._restore()
            self.base_lr_scheduler.step()
            self.last_epoch += 1
        else:
            self._step_base_to(epoch)
            self.last_epoch = epoch
        self._apply()

    def _restore(self) -> None:
        """Give the optimizer the other schedule's rates, from which that may compute its next."""
        for group, rate in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = rate

    def _step_base_to(self, epoch: int) -> None:
        base = self.base_lr_scheduler
        if not isinstance(base, LRScheduler):
            base.step(epoch)
            return
        # torch's own schedules no longer take a step's number: go back to the first and forward from there
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        base.last_epoch = -1
        for _ in range(epoch + 1):
            base.step()

    def _apply(self) -> None:
        size = self.batch_sizes[self.last_epoch % len(self.batch_sizes)]
        for group, rate in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = scale_lr(self.base_batch_size, size, rate, self.lr_scaling_method)
        if self.verbose:
            logger.info(f"step {self.last_epoch}: {size} sequences, learning rates {self.get_lr()}")
