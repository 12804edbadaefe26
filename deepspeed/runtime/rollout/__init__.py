# SPDX-License-Identifier: Apache-2.0
"""Rollouts: answers that a policy under training gives to prompts, by whichever engine generates them."""

from __future__ import annotations

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".base": [
            "RolloutBatch",
            "RolloutConfig",
            "RolloutEngine",
            "RolloutRequest",
            "SamplingConfig",
        ],
        ".factory": ["build_rollout"],
        ".hybrid_engine_rollout": ["HybridEngineRollout", "HybridEngineRolloutConfig"],
    },
)
