# SPDX-License-Identifier: Apache-2.0
"""The whole layer against a loop over tokens; names, dtypes, and what consumers rely on."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from deepspeed.moe.experts import Experts
from deepspeed.moe.gating import top1gating, top2gating, topkgating
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate

from .reference import of_dense


def expert(width=8):
    return nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))


def scattered(module):
    """Give each param, and so each expert, values of its own."""
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape) * 0.4)
    return module


def loop(layer, tokens):
    """Each token through its experts, one at a time, by the dense masks of the gate."""
    moe = layer.deepspeed_moe
    flat = tokens.reshape(-1, tokens.shape[-1])
    logits = flat @ moe.gate.wg.weight.t().to(flat.dtype)
    gate = moe.gate
    factor = gate.capacity_factor if layer.training else gate.eval_capacity_factor
    if gate.k == 1:
        made = top1gating(
            logits, factor, gate.min_capacity, use_rts=False, drop_tokens=gate.drop_tokens
        )
    elif gate.k == 2:
        made = top2gating(
            logits, factor, gate.min_capacity, gate.drop_tokens, top2_2nd_expert_sampling=False
        )
    else:
        made = topkgating(logits, gate.k, factor, gate.min_capacity, gate.drop_tokens)
    output = torch.zeros_like(flat)
    for t, e in of_dense(made[1]):
        share = made[1][t, e].sum()
        output[t] = output[t] + share * moe.experts.deepspeed_experts[e](flat[t : t + 1])[0]
    output = output.reshape(tokens.shape)
    if layer.use_residual:
        share = torch.softmax(layer.coefficient(tokens), dim=-1)
        output = output * share[..., :1] + layer.mlp(tokens) * share[..., 1:]
    return output, made[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_layer_and_its_gradients_are_the_loop(k, drop, residual, training, monkeypatch):
    # the gate computes in fp32 by contract: let it keep float64 here, so that only the maths differ
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    layer = MoE(
        8,
        expert(),
        num_experts=4,
        k=k,
        capacity_factor=1.0,
        eval_capacity_factor=0.5,
        min_capacity=2,
        use_residual=residual,
        drop_tokens=drop,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    scattered(layer).double().train(training)
    tokens = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    params = [tokens, *layer.parameters()]

    output, l_aux, counts = layer(tokens)
    wanted, wanted_loss = loop(layer, tokens)
    assert counts.sum() == 21 * k
    # float64 on both sides, sums of at most some dozen terms of order 1
    assert torch.allclose(output, wanted, atol=1e-12)
    assert torch.allclose(l_aux, wanted_loss, atol=1e-12)

    mix = torch.randn_like(output)
    got = torch.autograd.grad((output * mix).sum() + l_aux, params, allow_unused=True)
    want = torch.autograd.grad((wanted * mix).sum() + wanted_loss, params, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        # an expert that nobody chose has zero gradient here and none in the loop
        b = torch.zeros_like(a) if b is None else b
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_low_precision_tokens_keep_their_dtype(k, dtype):
    layer = MoE(8, expert(), num_experts=4, k=k, use_rts=False, top2_2nd_expert_sampling=False)
    scattered(layer)
    tokens = torch.randn(4, 8, 8)
    low = MoE(8, expert(), num_experts=4, k=k, use_rts=False, top2_2nd_expert_sampling=False)
    low.load_state_dict(layer.state_dict())
    low.to(dtype)
    # the same, rounded, weights and tokens in fp32: only the experts' rounding differs
    layer.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    output, l_aux, counts = low(tokens.to(dtype))
    wide, wide_loss, wide_counts = layer(tokens.to(dtype).float())
    assert output.dtype == dtype
    assert l_aux.dtype == torch.float32
    assert l_aux == wide_loss
    assert torch.equal(counts, wide_counts)
    # values of order 1 through two products of 8 and 16 terms: a few bf16 ulp of 2^-8
    assert torch.allclose(output.float(), wide, atol=0.05)


def test_gate_scores_in_fp32_under_autocast():
    layer = scattered(MoE(8, expert(), num_experts=4, k=2, top2_2nd_expert_sampling=False))
    tokens = torch.randn(16, 8)
    _, l_aux, _ = layer(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast_loss, _ = layer(tokens)
    assert torch.equal(l_aux, cast_loss)


def test_unused_tokens_reach_no_expert():
    layer = scattered(MoE(8, expert(), num_experts=2, min_capacity=16))
    tokens = torch.randn(2, 5, 8)
    used = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    output, _, counts = layer(tokens, used_token=used)
    assert counts.sum() == used.sum()
    assert torch.equal(output.abs().sum(-1) != 0, used.bool())


def test_full_queues_give_zero():
    layer = scattered(MoE(8, expert(), num_experts=4, capacity_factor=0.25, min_capacity=1))
    tokens = torch.randn(1, 8).repeat(16, 1)
    output, _, counts = layer(tokens)
    assert sorted(counts.tolist()) == [0, 0, 0, 16]
    assert (output.abs().sum(-1) != 0).sum() == 1


def test_what_a_full_expert_computes_cannot_poison_the_dropped():
    class Inverse(nn.Module):
        def forward(self, x):
            return 1 / x.sum(-1, keepdim=True) + x  # infinite where the queue is empty

    layer = MoE(4, Inverse(), num_experts=2, k=1, capacity_factor=0.5, min_capacity=1)
    output, _, _ = layer(torch.rand(12, 4) + 0.5)
    assert torch.isfinite(output).all()


def test_noise_is_for_training_only():
    layer = scattered(MoE(8, expert(), num_experts=4, k=1, noisy_gate_policy="Jitter"))
    tokens = torch.randn(16, 8)
    assert not torch.equal(layer(tokens)[1], layer(tokens)[1])
    layer.eval()
    assert torch.equal(layer(tokens)[1], layer(tokens)[1])


def test_names_and_marks_of_params():
    layer = MoE(8, nn.Linear(8, 8), num_experts=2, use_residual=True)
    names = {
        "deepspeed_moe.gate.wg.weight",
        "deepspeed_moe.experts.deepspeed_experts.0.weight",
        "deepspeed_moe.experts.deepspeed_experts.0.bias",
        "deepspeed_moe.experts.deepspeed_experts.1.weight",
        "deepspeed_moe.experts.deepspeed_experts.1.bias",
        "mlp.weight",
        "mlp.bias",
        "coefficient.weight",
        "coefficient.bias",
    }
    assert set(layer.state_dict()) == names
    marked = {name for name, p in layer.named_parameters() if not getattr(p, "allreduce", True)}
    assert marked == {name for name in names if ".deepspeed_experts." in name}
    assert {p.group_name for p in layer.parameters() if hasattr(p, "group_name")} == {"ep_size_1"}


def test_experts_start_as_copies():
    layer = MoE(8, nn.Linear(8, 8), num_experts=2, use_residual=True)
    first, second = layer.deepspeed_moe.experts.deepspeed_experts
    assert torch.equal(first.weight, second.weight)
    assert first.weight is not second.weight
    assert first.weight is not layer.mlp.weight


def test_experts_may_return_tuples():
    class WithBias(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias

    layer = MoE(8, WithBias(8, 8), num_experts=2, use_residual=True)
    assert layer(torch.randn(8, 8))[0].shape == (8, 8)


def test_experts_see_the_shape_of_queues():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x

    Experts(Spy(), 3)(torch.zeros(2, 3, 5, 7))
    assert seen == [(2, 1, 5, 7)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 4, "ep_size": 3}, r"Number of experts \(4\) should be divisible"),
        ({"num_experts": 4, "noisy_gate_policy": "Foo"}, "Unsupported noisy_gate_policy: Foo"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(AssertionError, match=message):
        MoE(8, nn.Linear(8, 8), **arguments)


@pytest.mark.parametrize("k", [0, 5])
def test_as_many_choices_as_experts_at_most(k):
    with pytest.raises(ValueError, match="cannot choose that many experts"):
        MoE(8, nn.Linear(8, 8), num_experts=4, k=k)


def test_spread_experts_need_their_group():
    layer = MoE(8, nn.Linear(8, 8), num_experts=4, ep_size=2)
    assert layer.num_local_experts == 2
    with pytest.raises(RuntimeError, match="set_deepspeed_parallelism"):
        layer(torch.randn(16, 8))


def test_times_are_taken_only_when_asked():
    layer = MoE(8, nn.Linear(8, 8), num_experts=2)
    moe = layer.deepspeed_moe
    assert isinstance(moe, MOELayer)
    assert isinstance(moe.gate, TopKGate)
    layer(torch.randn(8, 8))
    assert (moe.time_moe, moe.time_falltoall, moe.gate.gate_time) == (0.0, 0.0, 0.0)
    moe.wall_clock_breakdown = moe.gate.wall_clock_breakdown = True
    layer(torch.randn(8, 8))
    assert moe.time_moe > moe.gate.gate_time > 0
    assert moe.time_salltoall > 0


def test_the_layer_is_an_attribute_of_the_package():
    code = "import deepspeed; print(deepspeed.moe.layer.MoE.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("deepspeed.moe.layer")
