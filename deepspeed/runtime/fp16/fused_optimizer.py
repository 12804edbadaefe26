# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model with a fused optimizer, under the name that callers know."""

from __future__ import annotations

import torch

from ..zero import state
from ..zero.optimizer import ZeroOptimizer


class FP16_Optimizer(ZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model with a fused optimizer; see `ZeroOptimizer`."""

    saves_flat = True
    """Its checkpoints hold flat masters rather than one tensor a parameter."""

    @property
    def fp32_groups_flat(self) -> list[torch.Tensor]:
        """The fp32 masters of each group, one flat tensor."""
        return state.flat_masters(self)
