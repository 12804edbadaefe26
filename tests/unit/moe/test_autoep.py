# SPDX-License-Identifier: Apache-2.0
"""A layer that AutoEP puts in the place of a model's own computes what that one computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from tests.helpers.expert_models import Listed, Mixture, Stacked

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {
        "num_experts": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "head_dim": 8,
    },
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "DeepseekV2": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
    },
    "DeepseekV3": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def spread(model: torch.nn.Module, **settings: Any) -> int:
    found = AutoEP(model, parse_autoep_config({"enabled": True, **settings}))
    specs = found.ep_parser()
    for spec in specs:
        found.replace_moe_layer(spec, ep_size=1, ep_rank=0)
    return len(specs)


@pytest.mark.parametrize("kind", [Stacked, Listed])
@pytest.mark.parametrize("score_apply", ["post", "pre"])
def test_output_and_gradients_are_those_of_the_models_own_layer(
    kind: type, score_apply: str
) -> None:
    torch.manual_seed(1)
    own = Mixture(kind).double()
    other = copy.deepcopy(own)
    # "pre" scales what goes into an expert: another function, of which only the shape is looked at
    assert spread(other, score_apply=score_apply) == 2
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    first, second = own(x), other(x)
    first.backward()
    second.backward()
    if score_apply == "pre":
        assert torch.isfinite(second) and not torch.equal(first, second)
        return
    torch.testing.assert_close(second, first)
    for mine, theirs in zip(own.model.layers, other.model.layers, strict=True):
        torch.testing.assert_close(theirs.dense.weight.grad, mine.dense.weight.grad)
        torch.testing.assert_close(theirs.mlp.router.gate.weight.grad, mine.mlp.gate.weight.grad)
        if kind is Stacked:
            got = torch.cat([theirs.mlp.experts.w1.grad, theirs.mlp.experts.w3.grad], dim=1)
            torch.testing.assert_close(got, mine.mlp.experts.gate_up_proj.grad)
            torch.testing.assert_close(theirs.mlp.experts.w2.grad, mine.mlp.experts.down_proj.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_models_keep_their_outputs(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} does not have this family yet")
    latent = LATENT if family.startswith("Deepseek") else {}
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **latent, **FAMILIES[family]})
    torch.manual_seed(2)
    own = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, param in own.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(param)  # a router of zeros makes all experts alike
    other = copy.deepcopy(own)
    assert spread(other) == (1 if latent else 2)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        first, second = own(tokens), other(tokens)
    # fp32 sums in another order
    torch.testing.assert_close(second.logits, first.logits, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(
        getattr(first, "router_logits", None) or (),
        getattr(second, "router_logits", None) or (),
        strict=True,
    ):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def test_what_is_no_known_layer_is_refused_by_name() -> None:
    model = Mixture(Stacked)
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="unheard_of"):
        spread(model)
    with pytest.raises(ValueError, match="no layers of experts"):
        spread(Mixture(Stacked), moe_layer_pattern="nowhere")
    biased = Mixture(Listed)
    biased.model.layers[0].mlp.experts[0].up_proj.bias = torch.nn.Parameter(torch.zeros(6))
    with pytest.raises(ValueError, match=r"up_proj\.bias"):
        spread(biased)
    with pytest.raises(ValueError, match="load_balance_coeff"):
        spread(Mixture(Stacked), load_balance_coeff=0.1)
