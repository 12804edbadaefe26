# SPDX-License-Identifier: Apache-2.0
"""Attention of a vision encoder over patches that are split over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspeed import comm as dist
from deepspeed.utils.errors import explain

from .gathering import gathered


class UlyssesSPViTAttention(nn.Module):
    """Any self-attention of a vision encoder; each rank holds some of the patches, in the order of the ranks.

    All patches are gathered, attended to as they would be on one device, and each rank goes on with its own. Images have
    few patches beside what the rest of the encoder does to them, which stays split.

    Args:
        attention: called with `[batch, tokens, width]` of all tokens; returns as many, or a tuple that begins with them.
        process_group: the ranks that share an image.
        has_cls_token: the first token of each rank's share is one that all ranks have.
    """

    def __init__(
        self, attention: nn.Module, process_group: Any, has_cls_token: bool = False
    ) -> None:
        super().__init__()
        self.attn, self.process_group, self.has_cls_token = attention, process_group, has_cls_token

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend.

        Args:
            hidden_states: `[batch, own tokens, width]`.
            *args, **kwargs: passed to the attention; masks are of all tokens.

        Returns:
            What the attention gives, its first result cut down to this rank's tokens.

        Raises:
            ValueError: `hidden_states` are packed, without a batch (Qwen2-VL's).
        """
        if hidden_states.dim() != 3:
            raise ValueError(
                explain(
                    "packed patches of images cannot be split over ranks",
                    got=f"{type(self.attn).__name__} given shape {tuple(hidden_states.shape)}",
                    expected="[batch, tokens, width]",
                    fix="leave this vision encoder out of auto_wrap_model_for_sp",
                )
            )
        first = int(self.has_cls_token)
        common, own = hidden_states[:, :first], hidden_states[:, first:]
        patches, sizes = gathered(own, 1, self.process_group)
        result = self.attn(torch.cat([common, patches], dim=1), *args, **kwargs)
        whole = result[0] if isinstance(result, tuple) else result
        rank = dist.get_rank(self.process_group)
        start = first + sum(sizes[:rank])
        mine = torch.cat([whole[:, :first], whole[:, start : start + sizes[rank]]], dim=1)
        return (mine, *result[1:]) if isinstance(result, tuple) else mine
