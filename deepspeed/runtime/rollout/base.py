# SPDX-License-Identifier: Apache-2.0
"""What goes into a rollout and comes out of it, and what an engine for rollouts must do.

Prompts are padded on the left, so that all answers of a batch begin in one column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class RolloutConfig:
    """Which engine generates.

    Attributes:
        engine: its name; "hybrid_engine" is the one that is there.
        use_graph_capture: greedy answers through a static cache, whose steps can be captured and replayed.
    """

    engine: str = "hybrid_engine"
    use_graph_capture: bool = False


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer.
        temperature: of the distribution; 0 takes the likeliest token each time.
        top_p: draw among the likeliest tokens that hold this much probability.
        top_k: draw among so many likeliest tokens; -1 for all.
        n_samples_per_prompt: answers to each prompt, side by side in the batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    n_samples_per_prompt: int = 1


@dataclass(frozen=True)
class RolloutRequest:
    """Prompts to answer.

    Attributes:
        prompt_ids: token ids [batch, tokens], padded on the left.
        prompt_attention_mask: of the same shape, 0 for padding.

    Raises:
        ValueError: other shapes.
    """

    prompt_ids: torch.Tensor
    prompt_attention_mask: torch.Tensor

    def __post_init__(self) -> None:
        _check("prompt_ids", self.prompt_ids, "prompt_attention_mask", self.prompt_attention_mask)


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts with their answers.

    Attributes:
        input_ids: [batch, tokens], prompt and answer; padded on the right where an answer ended early.
        attention_mask: of the same shape, 0 for padding on either side.
        response_start_idx: [batch], the column in which each answer begins.

    Raises:
        ValueError: other shapes.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_start_idx: torch.Tensor

    def __post_init__(self) -> None:
        _check("input_ids", self.input_ids, "attention_mask", self.attention_mask)
        if self.response_start_idx.shape != self.input_ids.shape[:1]:
            raise ValueError(
                f"response_start_idx must be 1-D of length {self.input_ids.shape[0]}, "
                f"got shape {tuple(self.response_start_idx.shape)}"
            )

    @property
    def batch_size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]


def _check(name: str, ids: torch.Tensor, mask_name: str, mask: torch.Tensor) -> None:
    if ids.dim() != 2:
        raise ValueError(f"{name} must be 2-D [batch, tokens], got shape {tuple(ids.shape)}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"{mask_name} of shape {tuple(mask.shape)} does not match {name} of shape {tuple(ids.shape)}"
        )


class RolloutEngine(ABC):
    """Answers prompts with the policy's weights."""

    name: ClassVar[str] = "rollout"

    @abstractmethod
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Answer each prompt `n_samples_per_prompt` times."""

    @abstractmethod
    def sync_weights(self, step: int) -> None:
        """Take over the weights that training has reached at `step`."""

    def shutdown(self) -> None:
        """Free what the engine holds; nothing by default."""
        return None
