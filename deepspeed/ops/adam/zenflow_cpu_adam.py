# SPDX-License-Identifier: Apache-2.0
"""`ZenFlowCPUAdam`: the optimizer that ZenFlow gives the columns it does not step at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspeed.utils.logging import logger

from .cpu_adam import DeepSpeedCPUAdam


class ZenFlowCPUAdam(DeepSpeedCPUAdam):
    """`DeepSpeedCPUAdam`, driven by ``zero_optimization.zenflow``.

    Args:
        model_params: params, named params or param groups.
        lr, bias_correction, betas, eps, weight_decay, amsgrad, adamw_mode, fp32_optimizer_states: as of
            `DeepSpeedCPUAdam`.
        overlap_step: said in the log; the configuration's ``overlap_step`` decides.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
        overlap_step: bool = False,
    ) -> None:
        super().__init__(
            model_params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adamw_mode,
            fp32_optimizer_states,
        )
        self.overlap_step = overlap_step
        kind = "overlap step" if overlap_step else "sequential step"
        logger.info(f"ZenFlowCPUAdam initialized with {kind}.")
