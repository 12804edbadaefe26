# SPDX-License-Identifier: Apache-2.0
"""The three gates against loops over tokens, and against numbers recorded from DeepSpeed 0.19.8."""

import pytest
import torch

from deepspeed.moe import gating
from deepspeed.moe.gating import top1gating, top2gating, topkgating

from .reference import normalised, of_dense, route

SHAPES = [(10, 4), (33, 3), (64, 8), (5, 5)]
# Both sides compute in float64: softmax and a division or two, some ulp of 2e-16.
TOLERANCE = 1e-13


# name -> (loss, {(token, expert): (place, weight)}, counts), from DeepSpeed 0.19.8 in fp32
RECORDED = {
    "top1": (
        1.1763696670532227,
        {
            (0, 2): (0, 0.78559703),
            (1, 0): (0, 0.57409698),
            (2, 2): (1, 0.43675181),
            (3, 0): (1, 0.76053292),
            (4, 0): (2, 0.36716539),
        },
        [3, 0, 2],
    ),
    "top2": (
        1.1763696670532227,
        {
            (0, 0): (3, 0.18242553),
            (0, 2): (0, 0.81757444),
            (1, 0): (0, 0.62245935),
            (1, 1): (0, 0.37754068),
            (2, 1): (1, 0.42555746),
            (2, 2): (1, 0.57444251),
            (3, 0): (1, 0.85814893),
            (3, 2): (2, 0.14185107),
            (4, 0): (2, 0.52497917),
            (4, 1): (2, 0.4750208),
        },
        [4, 3, 3],
    ),
    "topk": (
        1.0270068645477295,
        {
            (0, 2): (0, 1.0),
            (1, 0): (0, 0.62245935),
            (1, 1): (0, 0.37754068),
            (2, 2): (1, 1.0),
            (3, 0): (1, 1.0),
            (4, 1): (1, 1.0),
        },
        [4, 3, 3],
    ),
}


def random_logits(tokens, experts, dtype=torch.float64):
    return torch.randn(tokens, experts, dtype=dtype) * 2


def assert_same_routes(got, wanted):
    assert set(got) == set(wanted)
    for key, (place, weight) in wanted.items():
        assert got[key][0] == place, key
        assert got[key][1] == pytest.approx(weight, abs=TOLERANCE), key


@pytest.mark.parametrize("with_unused", [False, True])
@pytest.mark.parametrize(
    ("factor", "least", "drop"), [(1.0, 2, True), (0.5, 0, True), (1, 4, False)]
)
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_top1_is_the_loop(tokens, experts, factor, least, drop, with_unused):
    logits = random_logits(tokens, experts)
    used = (torch.rand(tokens) > 0.3).long() if with_unused else None
    l_aux, combine, dispatch, counts = top1gating(
        logits, factor, least, used_token=used, drop_tokens=drop, use_rts=False
    )
    capacity = combine.shape[2]
    if drop:
        assert capacity == max(-(-tokens * factor // experts), least)
    else:
        assert capacity == counts.max()
    kept, loss, wanted_counts = route(
        logits.tolist(), 1, capacity, used.tolist() if with_unused else None
    )
    assert_same_routes(of_dense(combine), kept)
    assert torch.equal(dispatch, combine != 0)
    assert counts.tolist() == wanted_counts
    assert l_aux.item() == pytest.approx(loss, abs=TOLERANCE)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize(("factor", "least"), [(1.0, 2), (0.5, 0), (2.0, 0)])
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_top2_is_the_loop(tokens, experts, factor, least, drop):
    logits = random_logits(tokens, experts)
    l_aux, combine, dispatch, counts = top2gating(
        logits, factor, least, drop_tokens=drop, top2_2nd_expert_sampling=False
    )
    kept, loss, wanted_counts = route(logits.tolist(), 2, combine.shape[2])
    assert_same_routes(of_dense(combine), normalised(kept))
    assert torch.equal(dispatch, combine != 0)
    assert counts.tolist() == wanted_counts
    assert l_aux.item() == pytest.approx(loss, abs=TOLERANCE)
    if not drop:
        assert len(kept) == 2 * tokens


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("tokens", "experts"), SHAPES)
def test_topk_is_the_loop(tokens, experts, k, factor, drop, policy):
    logits = random_logits(tokens, experts)
    l_aux, combine, dispatch, counts = topkgating(
        logits, k, factor, 0, drop_tokens=drop, drop_policy=policy
    )
    kept, loss, wanted_counts = route(
        logits.tolist(), k, combine.shape[2], by_probability=policy == "probs"
    )
    assert_same_routes(of_dense(combine), normalised(kept))
    assert torch.equal(dispatch, combine != 0)
    assert counts.tolist() == wanted_counts
    assert l_aux.item() == pytest.approx(loss, abs=TOLERANCE)


def test_random_token_selection_keeps_full_queues_of_other_tokens():
    logits = torch.zeros(40, 2, dtype=torch.float64)
    logits[:, 0] = 1.0  # all want expert 0, whose queue has 20 places
    seen = set()
    for _ in range(5):
        _, combine, _, counts = top1gating(logits, 1.0, 0, use_rts=True)
        routes = of_dense(combine)
        kept = sorted(t for t, _ in routes)
        assert len(kept) == 20
        assert [routes[t, 0][0] for t in kept] == list(range(20))
        assert counts.tolist() == [40, 0]
        seen.add(tuple(kept))
    assert len(seen) == 5


def test_noise_only_changes_the_choice():
    logits = torch.zeros(2000, 4, dtype=torch.float64)
    logits[:, 3] = 1.0
    l_aux, combine, _, counts = top1gating(
        logits, 1.0, 0, noisy_gate_policy="RSample", drop_tokens=False, use_rts=False
    )
    probability = torch.softmax(logits[0], 0)
    # 2000 draws: the share of an expert is within 5 standard deviations, 0.056 at most
    assert torch.allclose(counts.double() / 2000, probability, atol=0.056)
    weights = combine.sum(dim=2)
    assert torch.allclose(weights.sum(1), probability[weights.argmax(1)])
    assert l_aux.item() == pytest.approx(
        4 * float(probability @ (counts.double() / 2000)), abs=1e-12
    )


def test_second_expert_is_drawn_from_the_rest():
    logits = torch.tensor([[3.0, 2.0, 1.0]]).repeat(3000, 1)
    _, combine, _, _ = top2gating(logits, 1.0, 0, drop_tokens=False)
    chosen = (combine.sum(2) != 0).double().mean(0)
    second = torch.softmax(torch.tensor([2.0, 1.0], dtype=torch.float64), 0)
    assert chosen[0] == 1.0
    # 3000 draws: five standard deviations are 0.041
    assert torch.allclose(chosen[1:], second, atol=0.041)


def test_gates_leave_the_logits_alone():
    logits = random_logits(16, 4)
    before = logits.clone()
    top1gating(logits, 1.0, 0, noisy_gate_policy="RSample")
    top2gating(logits, 1.0, 0)
    topkgating(logits, 3, 1.0, 0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_weighed_in_fp32(dtype):
    logits = random_logits(16, 4, torch.float32).to(dtype)
    for gate in (
        lambda x: top1gating(x, 1.0, 0, use_rts=False),
        lambda x: top2gating(x, 1.0, 0, top2_2nd_expert_sampling=False),
        lambda x: topkgating(x, 3, 1.0, 0),
    ):
        low, wide = gate(logits), gate(logits.float())
        assert low[0].dtype == low[1].dtype == torch.float32
        for a, b in zip(low, wide, strict=True):
            assert torch.equal(a, b)


def test_gradients_are_right():
    logits = random_logits(6, 4).requires_grad_()
    mix = torch.randn(6, 4, 6, dtype=torch.float64)
    for gate in (
        lambda x: top1gating(x, 1.0, 0, use_rts=False, drop_tokens=False),
        lambda x: top2gating(x, 1.0, 0, top2_2nd_expert_sampling=False),
        lambda x: topkgating(x, 3, 0.5, 0),
    ):

        def loss(x, gate=gate):
            l_aux, combine, _, _ = gate(x)
            return l_aux + (combine * mix[:, :, : combine.shape[2]]).sum()

        assert torch.autograd.gradcheck(loss, (logits,))


def test_sparse_and_dense_forms_agree():
    logits = random_logits(12, 4)
    dense = topkgating(logits, 3, 0.5, 0)
    sparse = topkgating(logits, 3, 0.5, 0, sparse_routes=True)
    l_aux, capacity, experts, indices, places, weights, counts = sparse
    assert (capacity, experts) == (dense[1].shape[2], 4)
    rebuilt = {
        (t, indices[n, t].item()): (places[n, t].item(), weights[n, t].item())
        for n in range(3)
        for t in range(12)
        if indices[n, t] >= 0
    }
    assert rebuilt == of_dense(dense[1])
    assert (indices < 0).any() and (weights[indices < 0] == 0).all()
    assert torch.equal(l_aux, dense[0])
    assert torch.equal(counts, dense[3])
    slots = gating.route_slots(indices, places, experts, capacity)
    assert (slots[indices < 0] == experts * capacity).all()
    assert torch.equal(gating.route_slots(list(indices), list(places), experts, capacity), slots)


def test_recorded_numbers():
    logits = torch.tensor(
        [[0.5, -1.0, 2.0], [1.5, 1.0, -0.5], [0.0, 0.3, 0.6], [2.0, 0.1, 0.2], [1.0, 0.9, 0.8]]
    )
    for name, made in (
        ("top1", top1gating(logits, 1.0, 1, drop_tokens=False, use_rts=False)),
        ("top2", top2gating(logits, 1.0, 1, top2_2nd_expert_sampling=False)),
        ("topk", topkgating(logits, 2, 0.5, 1)),
    ):
        l_aux, weights, counts = RECORDED[name]
        assert made[0].item() == pytest.approx(l_aux, abs=2e-7)
        assert made[3].tolist() == counts
        for key, (place, weight) in of_dense(made[1]).items():
            assert weights[key] == (place, pytest.approx(weight, abs=2e-7))
        assert len(of_dense(made[1])) == len(weights)


def test_fewer_tokens_than_places_is_no_error():
    logits = random_logits(2, 4)
    for combine in (top1gating(logits, 1.0, 4)[1], topkgating(logits, 3, 1.0, 4)[1]):
        assert combine.shape == (2, 4, 4)
        assert (combine.sum((1, 2)) > 0).all()


def test_unknown_drop_policy_is_refused():
    with pytest.raises(ValueError, match="Invalid drop_policy: none"):
        topkgating(random_logits(8, 4), 2, 1.0, 0, drop_policy="none")


def test_jitter_stays_in_its_band():
    x = torch.full((1000,), 2.0)
    noisy = gating.multiplicative_jitter(x, x.device, epsilon=0.25)
    assert noisy.min() >= 1.5
    assert noisy.max() <= 2.5
    assert noisy.std() > 0.2  # uniform: 0.29
    assert gating.multiplicative_jitter(x, x.device, epsilon=0) is x


def test_gumbel_noise_has_its_mean_and_deviation():
    noise = gating.gumbel_rsample((200_000,), "cpu")
    # Euler's constant and pi / sqrt(6); standard error of both about 0.003
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.015)
