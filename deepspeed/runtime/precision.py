# SPDX-License-Identifier: Apache-2.0
"""Which dtypes a run computes, reduces, accumulates and steps in: one frozen policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .fp16.loss_scaler import LossScaler, LossScalerBase


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        compute: dtype of module parameters; None leaves a model of several dtypes as it is.
        accumulate: dtype in which gradients add up over micro-batches; None is the parameter's own.
        reduce: dtype in which gradients travel between ranks; None is the parameter's own.
        low_precision_master: step parameters in their own dtype, with no fp32 copy.
        buffers: dtype of floating buffers; None leaves them alone.
        autocast: dtype of the autocast region around the forward pass; None for no region.
        check_overflow: skip a step whose gradients are not finite.
        take_overflow: step with gradients that are not finite, too, as the user asked for.
        make_scaler: builds the loss scaler.
    """

    compute: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    reduce: torch.dtype | None = None
    low_precision_master: bool = False
    buffers: torch.dtype | None = None
    autocast: torch.dtype | None = None
    check_overflow: bool = False
    take_overflow: bool = False
    make_scaler: Callable[[], LossScalerBase] = LossScaler

    def master_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter of `param_dtype` is stepped: fp32 at least, unless the user gave that up."""
        if self.low_precision_master or param_dtype == torch.float64:
            return param_dtype
        return torch.float32

    def accumulate_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a parameter of `param_dtype` add up."""
        return self.accumulate or param_dtype

    def reduce_dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a parameter of `param_dtype` travel."""
        return self.reduce or param_dtype

    def forward_context(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast region of the forward pass, or nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type=device.type, dtype=self.autocast)
