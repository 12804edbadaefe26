# SPDX-License-Identifier: Apache-2.0
"""Stage 0 over an fp16 or bf16 model with any torch optimizer, under the name that callers know."""

from __future__ import annotations

from ..zero.optimizer import ZeroOptimizer


class FP16_UnfusedOptimizer(ZeroOptimizer):
    """Stage 0 over an fp16 or bf16 model with any torch optimizer; see `ZeroOptimizer`."""
