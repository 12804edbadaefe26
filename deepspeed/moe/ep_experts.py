# SPDX-License-Identifier: Apache-2.0
"""The experts of this rank as three stacked weights, computed together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .ep_kernels import grouped_mm_available, grouped_product, scale_grad


class GroupedExperts(nn.Module):
    """Gated feed-forward experts: ``(act(x w1^T) * (x w3^T)) w2^T``, with a matrix of each for every expert.

    Args:
        dim: size of a token.
        hidden_dim: size inside an expert.
        num_experts: experts of this rank.
        use_grouped_mm: one kernel for all experts' products, where torch has one for the tensors at hand.
        activation: of the gate's product; SiLU unless told.
        dtype, device: of the weights, which are uninitialised.

    `grad_share` multiplies the weights' gradients: ranks that share the experts add up the gradients of all their
    tokens, while the reducer averages over those that hold the same experts only.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        use_grouped_mm: bool = True,
        activation: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.use_grouped_mm = num_experts, use_grouped_mm
        self.activation = nn.functional.silu if activation is None else activation
        self.grad_share = 1.0

        def stacked(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, rows, columns, dtype=dtype, device=device))

        self.w1 = stacked(hidden_dim, dim)
        self.w2 = stacked(dim, hidden_dim)
        self.w3 = stacked(hidden_dim, dim)

    def forward(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """Compute rows that are sorted by expert.

        Args:
            rows: [T, dim].
            num_tokens_per_expert: [num_experts] integers that add up to T.

        Returns:
            [T, dim].
        """
        w1, w2, w3 = (scale_grad(w, self.grad_share) for w in (self.w1, self.w2, self.w3))
        grouped = self.use_grouped_mm and grouped_mm_available(rows, w1)
        counts = num_tokens_per_expert
        if not grouped:
            counts = counts.cpu()  # one wait for the device, not one a product
        gate = self.activation(grouped_product(rows, w1, counts, grouped))
        up = grouped_product(rows, w3, counts, grouped)
        return grouped_product(gate * up, w2, counts, grouped)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        hidden, dim = self.w1.shape[1:] if self.w1.dim() == 3 else ("?", "?")
        return f"num_experts={self.num_experts}, dim={dim}, hidden_dim={hidden}"
