# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model with any torch optimizer, under the name that callers know."""

from __future__ import annotations

import torch

from ..zero import state
from ..zero.optimizer import ZeroOptimizer


class FP16_UnfusedOptimizer(ZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model with any torch optimizer; see `ZeroOptimizer`."""

    @property
    def fp32_groups(self) -> list[list[torch.Tensor]]:
        """The fp32 masters of each group's parameters, in their shapes."""
        return state.masters_by_param(self)
