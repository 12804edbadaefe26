# SPDX-License-Identifier: Apache-2.0
"""Progressive layer dropping: the probability that a layer is kept, falling as training goes on."""

from __future__ import annotations

from typing import Any

import numpy as np


class ProgressiveLayerDrop:
    """Keep probability theta(t) = (1 - theta) * exp(-gamma * t) + theta, from 1 down to theta.

    Args:
        theta: the probability that is approached.
        gamma: how fast.
    """

    def __init__(self, theta: float = 0.5, gamma: float = 0.001) -> None:
        self.theta = theta
        self.gamma = gamma
        self.current_theta = 1.0

    def get_state(self) -> dict[str, Any]:
        """The keyword arguments that a model's forward takes."""
        return {"progressive_layer_drop": True, "pld_theta": self.get_theta()}

    def get_theta(self) -> float:
        """The keep probability now."""
        return self.current_theta

    def update_state(self, global_step: int) -> None:
        """Set the keep probability of a step."""
        fallen = float(np.exp(-self.gamma * global_step))
        self.current_theta = (1.0 - self.theta) * fallen + self.theta
