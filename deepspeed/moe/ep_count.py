# SPDX-License-Identifier: Apache-2.0
"""How many of the routed rows each expert gets."""

from __future__ import annotations

import torch
from torch import Tensor


def count_tokens_per_expert(selected_experts: Tensor, num_experts: int) -> Tensor:
    """The number of times that each expert was chosen.

    Args:
        selected_experts: numbers of experts, of any shape.
        num_experts: how many there are.

    Returns:
        [num_experts], int32, on the same device.
    """
    chosen = selected_experts.reshape(-1).to(torch.int64)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    # bincount would wait for the device to learn how many bins there are
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen)).to(torch.int32)
