# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks compute what one process with all experts computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.moe.layer import MoE
from deepspeed.moe.mappings import drop_tokens, gather_tokens
from deepspeed.moe.sharded_moe import _AllToAll
from deepspeed.utils import groups

EXPERTS, WIDTH = 4, 8


def layer_of(ep_size: int, k: int, drop: bool) -> MoE:
    return MoE(
        WIDTH,
        nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)),
        num_experts=EXPERTS,
        ep_size=ep_size,
        k=k,
        capacity_factor=0.75,
        min_capacity=1,
        drop_tokens=drop,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


def whole_layer(k: int, drop: bool, dtype: torch.dtype) -> MoE:
    layer = layer_of(1, k, drop)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return layer.to(dtype)


def tokens_of(rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 9, WIDTH, generator=generator).to(dtype).requires_grad_()


def spread(rank, ep_size, k, drop, dtype):
    """Output, loss, counts, token gradient, and the gradients of this rank's experts."""
    groups.reset()
    layer = layer_of(ep_size, k, drop).to(dtype)
    whole = whole_layer(k, drop, dtype)
    local = EXPERTS // ep_size
    first = rank % ep_size * local
    moe, wanted = layer.deepspeed_moe, whole.deepspeed_moe
    moe.gate.load_state_dict(wanted.gate.state_dict())
    for i, expert in enumerate(moe.experts.deepspeed_experts):
        expert.load_state_dict(wanted.experts.deepspeed_experts[first + i].state_dict())
    layer.set_deepspeed_parallelism()
    layer.set_deepspeed_parallelism()  # a second layer of the same size finds the group
    assert torch.distributed.get_world_size(moe.ep_group) == ep_size

    tokens = tokens_of(rank, dtype)
    output, l_aux, counts = layer(tokens)
    (output.float().square().sum() + l_aux).backward()
    grads = {
        first + i: [param.grad for param in expert.parameters()]
        for i, expert in enumerate(moe.experts.deepspeed_experts)
    }
    groups.reset()
    return output.detach(), l_aux.detach(), counts, tokens.grad, grads


def alone(rank, k, drop, dtype):
    """The same by one process: tokens of one rank through all experts."""
    layer = whole_layer(k, drop, dtype)
    tokens = tokens_of(rank, dtype)
    output, l_aux, counts = layer(tokens)
    (output.float().square().sum() + l_aux).backward()
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    grads = [[param.grad for param in expert.parameters()] for expert in experts]
    return output.detach(), l_aux.detach(), counts, tokens.grad, grads


def check(results, ep_size, k, drop, dtype):
    # float64: sums in another order. bf16: the experts' products run over batches of another size, and
    # an expert's gradient is one sum over all ranks' tokens here, a sum of rounded sums there: some
    # ulp of 2^-8 of values up to about 30.
    exact = {"rtol": 1e-12, "atol": 1e-12}
    near = {"rtol": 0.05, "atol": 0.3} if dtype == torch.bfloat16 else exact
    singles = [alone(rank, k, drop, dtype) for rank in range(len(results))]
    for got, want in zip(results, singles, strict=True):
        torch.testing.assert_close(got[0], want[0], **near)
        torch.testing.assert_close(got[1], want[1], **exact)
        assert torch.equal(got[2], want[2])
        torch.testing.assert_close(got[3], want[3], **near)
    for rank, (*_, grads) in enumerate(results):
        block = rank // ep_size * ep_size
        for expert, found in grads.items():
            parts = [singles[r][4][expert] for r in range(block, block + ep_size)]
            for grad, *shares in zip(found, *parts, strict=True):
                torch.testing.assert_close(grad, sum(shares), **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_two_ranks_share_the_experts(ranks2, k, drop, dtype):
    check(ranks2.run(spread, 2, k, drop, dtype), 2, k, drop, dtype)


def test_two_pairs_of_ranks_share_the_experts(ranks4):
    check(ranks4.run(spread, 2, 2, True, torch.float64), 2, 2, True, torch.float64)


def test_one_expert_a_rank(ranks4):
    check(ranks4.run(spread, 4, 1, False, torch.float64), 4, 1, False, torch.float64)


def without_sharing(rank):
    groups.reset()
    layer = whole_layer(2, False, torch.float64)
    layer.set_deepspeed_parallelism()
    assert torch.distributed.get_world_size(layer.deepspeed_moe.ep_group) == 1
    output = layer(tokens_of(rank, torch.float64))[0].detach()
    groups.reset()
    return output


def test_each_rank_with_all_experts_needs_no_exchange(ranks2):
    for rank, output in enumerate(ranks2.run(without_sharing)):
        torch.testing.assert_close(output, alone(rank, 2, False, torch.float64)[0])


def exchange(rank):
    sent = (torch.arange(4.0) + 10 * rank).requires_grad_()
    received = _AllToAll.apply(torch.distributed.group.WORLD, sent)
    (received * torch.tensor([1.0, 2.0, 3.0, 4.0]) * (rank + 1)).sum().backward()
    return received.detach(), sent.grad


def test_exchange_and_its_gradient(ranks2):
    (first, first_grad), (second, second_grad) = ranks2.run(exchange)
    assert first.tolist() == [0, 1, 10, 11]
    assert second.tolist() == [2, 3, 12, 13]
    assert first_grad.tolist() == [1, 2, 2, 4]
    assert second_grad.tolist() == [3, 4, 6, 8]


def tensor_parallel(rank):
    groups.reset()
    groups._create_model_parallel(2)
    whole = torch.arange(8.0).reshape(2, 4).requires_grad_()
    share = drop_tokens(whole, dim=1)
    back = gather_tokens(share * 2, dim=1)
    (back * (1 + torch.arange(4.0))).sum().backward()
    layer = layer_of(1, 2, True)
    capacity = layer.deepspeed_moe.gate(torch.randn(9, WIDTH))[1].shape[2]
    groups.reset()
    return share.detach(), back.detach(), whole.grad, capacity


def test_tensor_parallel_ranks_share_tokens(ranks2):
    for rank, (share, back, grad, capacity) in enumerate(ranks2.run(tensor_parallel)):
        whole = torch.arange(8.0).reshape(2, 4)
        assert torch.equal(share, whole[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(back, whole * 2)
        assert torch.equal(grad, (2.0 * (1 + torch.arange(4.0))).expand(2, 4))
        assert capacity == 4  # ceil(9 / 4 * 0.75 * 2) = 4, even already


def test_a_layer_without_processes_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_distributed"):
        layer_of(2, 1, True).set_deepspeed_parallelism()
