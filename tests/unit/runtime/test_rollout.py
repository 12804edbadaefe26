# SPDX-License-Identifier: Apache-2.0
"""Rollouts by an engine that has no `generate` of its own: what the model is asked for, and how it is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepspeed.runtime.rollout import (
    HybridEngineRollout,
    RolloutConfig,
    RolloutRequest,
    SamplingConfig,
    build_rollout,
)

TOKENS = SimpleNamespace(pad_token_id=0, eos_token_id=9)


class Policy(nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.body, self.frozen, self.fails, self.asked = nn.Dropout(), nn.Dropout(), fails, {}
        self.frozen.eval()

    def generate(self, ids, **asked):
        assert not any(m.training for m in self.modules())
        if self.fails:
            raise KeyError("on the way")
        self.asked = asked
        answers = torch.tensor([[5, 9, 0], [9, 0, 0]]).repeat(ids.shape[0] // 2, 1)
        return torch.cat([ids, answers], dim=1)


def rollout(policy, **sampling):
    ids = torch.tensor([[0, 3], [4, 5]])
    engine = HybridEngineRollout(SimpleNamespace(module=policy), TOKENS)
    return engine.generate(RolloutRequest(ids, (ids > 0).long()), SamplingConfig(3, **sampling))


@pytest.mark.parametrize("fails", [False, True])
def test_each_part_of_the_model_goes_back_to_its_own_mode(fails):
    policy = Policy(fails)
    if fails:
        with pytest.raises(KeyError, match="on the way"):
            rollout(policy)
    else:
        rollout(policy)
    assert (policy.training, policy.body.training, policy.frozen.training) == (True, True, False)


def test_answers_are_masked_after_their_end_and_sampled_as_asked():
    policy = Policy()
    batch = rollout(policy, temperature=0.5, top_p=0.9)
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch.response_start_idx.tolist() == [2, 2]
    drawn = {key: policy.asked[key] for key in ("do_sample", "temperature", "top_p", "top_k")}
    assert drawn == {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
    rollout(policy, temperature=0)
    assert policy.asked["do_sample"] is False and "temperature" not in policy.asked


def test_engines_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="vllm"):
        build_rollout(RolloutConfig(engine="vllm"), object(), TOKENS)
    with pytest.raises(ValueError, match="tokenizer"):
        build_rollout(RolloutConfig(), object())
