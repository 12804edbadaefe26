# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for fp16: multiply the loss so that small gradients survive, back off when large ones overflow.

Micikevicius et al. 2018, arXiv:1710.03740 §3.2. The attribute names are those that checkpoints hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

INITIAL_LOSS_SCALE = "init_scale"
SCALE_WINDOW = "scale_window"
DELAYED_SHIFT = "delayed_shift"
CONSECUTIVE_HYSTERESIS = "consecutive_hysteresis"
MIN_LOSS_SCALE = "min_scale"


class LossScalerBase:
    """The scale and how it changes.

    Args:
        cur_scale: factor applied to the loss.
    """

    dynamic: bool = False

    def __init__(self, cur_scale: float) -> None:
        self.cur_scale = float(cur_scale)

    @property
    def loss_scale(self) -> float:
        """The factor in force."""
        return self.cur_scale

    def scale_gradient(
        self, module: Any, grad_in: tuple[torch.Tensor, ...], grad_out: Any
    ) -> tuple[torch.Tensor, ...]:
        """Multiply the gradients of a module hook by the scale."""
        return tuple(self.cur_scale * g for g in grad_in)

    def update_scale(self, overflow: bool) -> None:
        """Take note of one step: `overflow` says that its gradients were not finite."""

    def backward(self, loss: torch.Tensor, retain_graph: bool = False) -> None:
        """Back-propagate the scaled loss."""
        (loss * self.cur_scale).backward(retain_graph=retain_graph)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that `load_state_dict` takes back."""
        return {k: v for k, v in vars(self).items() if isinstance(v, (bool, int, float))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the numbers of `state_dict`; unknown keys are left alone."""
        for key, value in state.items():
            if key in vars(self):
                setattr(self, key, value)


class LossScaler(LossScalerBase):
    """A fixed scale.

    Args:
        scale: the factor; 1.0 for bf16 and fp32.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)


class DynamicLossScaler(LossScalerBase):
    """A scale that halves on overflow and doubles after a run of clean steps.

    Args:
        init_scale: first scale.
        scale_window: clean steps after which the next one makes it grow.
        min_scale: never below this.
        delayed_shift: overflows tolerated before the scale is lowered (hysteresis).
        consecutive_hysteresis: whether every clean step refills that tolerance.
        raise_error_at_min_scale: raise when an overflow comes at `min_scale`.
        dtype: dtype of the gradients, for messages.
        scale_factor: what it is divided or multiplied by.
    """

    dynamic = True

    def __init__(
        self,
        init_scale: float = 2.0**32,
        scale_window: int = 1000,
        min_scale: float = 1,
        delayed_shift: int = 1,
        consecutive_hysteresis: bool = False,
        raise_error_at_min_scale: bool = True,
        dtype: torch.dtype = torch.half,
        scale_factor: float = 2.0,
    ) -> None:
        super().__init__(init_scale)
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.scale_factor = scale_factor
        self.scale_window = scale_window
        self.min_scale = min_scale
        self.delayed_shift = delayed_shift
        self.cur_hysteresis = delayed_shift
        self.consecutive_hysteresis = consecutive_hysteresis
        self.raise_error_at_min_scale = raise_error_at_min_scale
        self.dtype = dtype

    def update_scale(self, overflow: bool) -> None:
        """Lower, keep or raise the scale after one step.

        Raises:
            RuntimeError: on overflow at the smallest scale allowed.
        """
        if overflow:
            self._back_off()
            self.last_overflow_iter = self.cur_iter
        else:
            if self.consecutive_hysteresis:
                self.cur_hysteresis = self.delayed_shift
            clean = self.cur_iter - self.last_overflow_iter - 1
            if clean > 0 and clean % self.scale_window == 0:
                self.cur_hysteresis = self.delayed_shift
                self.cur_scale *= self.scale_factor
        self.cur_iter += 1

    def _back_off(self) -> None:
        if self.delayed_shift > 1 and self.cur_hysteresis > 1:
            self.cur_hysteresis -= 1
            return
        if self.cur_scale <= self.min_scale and self.raise_error_at_min_scale:
            raise RuntimeError(
                explain(
                    "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.",
                    got=f"non-finite gradients at loss scale {self.cur_scale}",
                    expected=f"finite gradients at a scale of at least {self.min_scale}",
                    fix="lower the learning rate, look for NaN in the data, or train in bf16",
                )
            )
        self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_scale)


class UnguardedLossScaler(DynamicLossScaler):
    """The stage-0 rules: no hysteresis, and no error at the floor."""

    def __init__(self, init_scale: float, scale_window: int, min_scale: float) -> None:
        super().__init__(
            init_scale,
            scale_window=scale_window,
            min_scale=min_scale,
            raise_error_at_min_scale=False,
        )


@dataclass(frozen=True)
class LossScaleConfig:
    """A scaler as stage 0 shows it.

    Attributes:
        use_grad_scaling: whether losses are scaled at all.
        dynamic_loss_scale: whether the scale changes; what is None below belongs to one that does.
        cur_iter: steps so far, skipped ones included.
        cur_scale: the scale in force.
        last_overflow_iter: the step that overflowed last; -1 for none.
        scale_factor: what the scale is divided or multiplied by.
        scale_window: clean steps after which the next one makes it grow.
        min_loss_scale: never below this.
    """

    use_grad_scaling: bool
    dynamic_loss_scale: bool
    cur_iter: int
    cur_scale: float
    last_overflow_iter: int | None = None
    scale_factor: float | None = None
    scale_window: int | None = None
    min_loss_scale: float | None = None

    @classmethod
    def of(cls, scaler: LossScalerBase) -> LossScaleConfig:
        """How `scaler` stands now."""
        if not isinstance(scaler, DynamicLossScaler):
            return cls(scaler.cur_scale != 1.0, False, 0, scaler.cur_scale)
        return cls(
            True,
            True,
            scaler.cur_iter,
            scaler.cur_scale,
            scaler.last_overflow_iter,
            scaler.scale_factor,
            scaler.scale_window,
            scaler.min_scale,
        )


def CreateLossScaler(
    dtype: torch.dtype,
    static_loss_scale: float,
    dynamic_scaling: bool,
    dynamic_loss_args: dict[str, Any] | None,
) -> LossScalerBase:
    """The scaler for gradients of `dtype`: only fp16 is ever scaled."""
    if dtype != torch.half or not dynamic_scaling:
        scale = static_loss_scale if dtype == torch.half else 1.0
        return LossScaler(scale=scale)
    return DynamicLossScaler(dtype=dtype, **(dynamic_loss_args or {}))


def to_python_float(t: Any) -> float:
    """A number from a number or a one-element tensor."""
    return float(t.item()) if hasattr(t, "item") else float(t)


def report_overflow(before: float, scaler: LossScalerBase, hysteresis_before: int | None) -> None:
    """Log a skipped step in the words that users search for."""
    if scaler.cur_scale == before and hysteresis_before is not None and hysteresis_before > 1:
        tail = (
            f"but hysteresis is {hysteresis_before}. Reducing hysteresis to {hysteresis_before - 1}"
        )
    else:
        tail = f"reducing to {int(scaler.cur_scale)}"
    logger.info(
        "[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: %d, %s",
        int(before),
        tail,
    )
