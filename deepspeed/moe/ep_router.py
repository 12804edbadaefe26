# SPDX-License-Identifier: Apache-2.0
"""A router by which each token chooses its experts, equal in its numbers to those of Hugging Face models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ep_count import count_tokens_per_expert

# what DeepSeek-V3 adds to a sum of scores before it divides by it
_LEAST_SUM = 1e-20


class RouterGate(nn.Linear):
    """The linear layer of a router; its output is what `output_router_logits` of a model collects.

    `in_fp32` computes in fp32 whatever the dtypes are.
    """

    in_fp32 = False

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, dim] -> [N, experts]."""
        if not self.in_fp32:
            return nn.functional.linear(tokens, self.weight, self.bias)
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(tokens.float(), self.weight.float(), bias)


class TokenChoiceTopKRouter(nn.Module):
    """Scores all experts for each token and keeps the best.

    Args:
        dim: size of a token.
        num_experts: experts on all ranks together.
        num_expert_groups: groups that the experts are in; None for none.
        num_limited_groups: groups that a token may use experts of.
        top_k: experts of a token.
        score_func: "softmax" or "sigmoid".
        route_norm: scores of the chosen experts are divided by their sum.
        route_scale: factor on the scores.
        gate_bias: the linear layer has a bias.

    Attributes:
        e_score_correction_bias: added to scores for the choice only (DeepSeek-V3); None, a buffer or a parameter.
        masked_score: what experts of other groups score.
        scores_in_logits_dtype: scores are rounded to the logits' dtype, else they are fp32.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_expert_groups: int | None,
        num_limited_groups: int | None,
        top_k: int,
        score_func: str = "softmax",
        route_norm: bool = False,
        route_scale: float = 1.0,
        gate_bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate = RouterGate(dim, num_experts, bias=gate_bias)
        self.num_experts, self.top_k = num_experts, top_k
        self.num_expert_groups, self.num_limited_groups = num_expert_groups, num_limited_groups
        self.score_func, self.route_norm, self.route_scale = score_func, route_norm, route_scale
        self.masked_score = float("-inf")
        self.least_sum = _LEAST_SUM if score_func == "sigmoid" else 0.0
        self.scores_in_logits_dtype = False
        self.register_buffer("e_score_correction_bias", None)

    def forward(self, tokens: Tensor, with_logits: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            tokens: [N, dim].
            with_logits: return all logits [N, num_experts] in the third place.

        Returns:
            The scores of the chosen experts [N, top_k], their numbers [N, top_k] int64, and how often each was chosen
            [num_experts] int32.
        """
        logits = self.gate(tokens)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        scores = wide.sigmoid() if self.score_func == "sigmoid" else wide.softmax(dim=-1)
        chosen = torch.topk(self._for_choice(scores.detach()), self.top_k, dim=-1).indices
        best = scores.gather(1, chosen)
        if self.route_norm:
            best = best / (best.sum(dim=-1, keepdim=True) + self.least_sum)
        if self.route_scale != 1.0:
            best = best * self.route_scale
        if self.scores_in_logits_dtype:
            best = best.to(logits.dtype)
        third = logits if with_logits else count_tokens_per_expert(chosen, self.num_experts)
        return best, chosen, third

    def _for_choice(self, scores: Tensor) -> Tensor:
        """What experts are chosen by: [N, num_experts], without a gradient."""
        bias = self.e_score_correction_bias
        if bias is not None:
            scores = scores + bias.detach().to(scores.dtype)
        groups, limit = self.num_expert_groups, self.num_limited_groups
        if not groups or not limit or groups == 1:
            return scores
        by_group = scores.view(scores.shape[0], groups, -1)
        if self.score_func == "sigmoid":  # DeepSeek-V3: a group is as good as its best two
            worth = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(dim=-1)
        else:
            worth = by_group.amax(dim=-1)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(1, worth.topk(limit, dim=-1).indices, True)
        return by_group.masked_fill(~kept.unsqueeze(-1), self.masked_score).view_as(scores)
