# SPDX-License-Identifier: Apache-2.0
"""Rollouts by the training engine itself: the weights that answer are the ones that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from deepspeed.runtime.zero.gathered import GatheredParameters
from deepspeed.utils.module_utils import evaluating

from .base import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig


@dataclass(frozen=True)
class HybridEngineRolloutConfig:
    """Options of `HybridEngineRollout`.

    Attributes:
        use_graph_capture: generate greedy answers through transformers' static cache, which has fixed addresses, so that
            on a GPU the step is compiled and captured; answers that are sampled go the usual way.
    """

    use_graph_capture: bool = False


class HybridEngineRollout(RolloutEngine):
    """Answers prompts by `engine.generate`, or by the module's under gathered parameters where the engine has none.

    Args:
        engine: a `DeepSpeedHybridEngine`, or another engine around a model with `generate`.
        tokenizer: its `pad_token_id` (else `eos_token_id`) fills up answers; `eos_token_id` ends them.
        cfg: options.
    """

    name: ClassVar[str] = "hybrid_engine"

    def __init__(
        self, engine: Any, tokenizer: Any, cfg: HybridEngineRolloutConfig | None = None
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.cfg = cfg or HybridEngineRolloutConfig()
        self.use_graph_capture = self.cfg.use_graph_capture

    @torch.no_grad()
    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Answer each prompt; the module is in evaluation mode meanwhile."""
        samples = sampling.n_samples_per_prompt
        prompts = request.prompt_ids.repeat_interleave(samples, dim=0)
        mask = request.prompt_attention_mask.repeat_interleave(samples, dim=0)
        greedy = sampling.temperature == 0
        with evaluating(self.engine.module):
            if greedy and self.use_graph_capture:
                ids = self._generate_graph(prompts, mask, sampling.max_new_tokens)
            else:
                drawn = {} if greedy else self._drawn(sampling)
                ids = self._generate(prompts, mask, sampling.max_new_tokens, **drawn)
        width = prompts.shape[1]
        starts = torch.full((ids.shape[0],), width, dtype=torch.long, device=ids.device)
        answer = self._answer_mask(ids[:, width:])
        mask = torch.cat([mask.to(ids.device), answer.to(mask.dtype)], dim=1)
        return RolloutBatch(ids, mask, starts)

    def sync_weights(self, step: int) -> None:
        """Nothing to do: there is one set of weights."""

    @staticmethod
    def _drawn(sampling: SamplingConfig) -> dict[str, Any]:
        return {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(sampling.top_k, 0),
        }

    def _generate(
        self, prompts: torch.Tensor, mask: torch.Tensor, longest: int, **options: Any
    ) -> torch.Tensor:
        options = {"do_sample": False, **options}
        module = self.engine.module
        gathers = hasattr(
            type(self.engine), "generate"
        )  # an engine passes other names on to its module
        with GatheredParameters(module.parameters(), enabled=not gathers):
            return (self.engine if gathers else module).generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=longest,
                pad_token_id=self._pad(),
                eos_token_id=self.tokenizer.eos_token_id,
                **options,
            )

    def _generate_graph(
        self, prompts: torch.Tensor, mask: torch.Tensor, longest: int
    ) -> torch.Tensor:
        return self._generate(prompts, mask, longest, cache_implementation="static")

    def _pad(self) -> Any:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _answer_mask(self, answers: torch.Tensor) -> torch.Tensor:
        """1 up to each answer's first ending token, that one included."""
        end = self.tokenizer.eos_token_id
        if end is None:
            return torch.ones_like(answers)
        ends = torch.as_tensor(end, device=answers.device).reshape(-1)
        ended = torch.isin(answers, ends).long()
        return (ended.cumsum(dim=1) - ended).eq(0).long()

    @staticmethod
    def _sample_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
        """Draw one token a row, [batch, 1], among the likeliest that together hold `top_p` of the probability."""
        probs = torch.softmax(logits.double() / temperature, dim=-1)
        ranked, order = probs.sort(dim=-1, descending=True)
        beyond = ranked.cumsum(dim=-1) - ranked >= top_p
        ranked = ranked.masked_fill(beyond, 0.0)
        return order.gather(-1, torch.multinomial(ranked, num_samples=1))
