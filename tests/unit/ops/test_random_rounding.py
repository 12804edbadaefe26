# SPDX-License-Identifier: Apache-2.0
"""Adam on bf16 params without a master copy: rounding by chance is unbiased, repeatable and the same everywhere."""

from __future__ import annotations

import copy

import pytest
import torch

from deepspeed.ops import native, random_bits, registry
from deepspeed.ops.adam import DeepSpeedCPUAdam
from tests.unit.ops.cases import BF16, F32, make_adam
from tests.unit.ops.conftest import paths

RULE = (1e-2, 0.9, 0.99, 1e-8, 0.1, 3, True, True, 0.5)


def arguments(numel, state, grad=BF16, offset=1):
    return make_adam(numel, (BF16, state, grad, None), offset)[:4]


def stepped(op, args, seed=5):
    copies = [a.clone() for a in args]
    op(*copies, *RULE, seed)
    return copies[:3]


@pytest.mark.parametrize("state", [BF16, F32])
@pytest.mark.parametrize("grad", [BF16, F32])
def test_every_path_and_number_of_threads_gives_the_same_bits(state, grad, monkeypatch):
    op = registry.ops()["random_adam_step"]
    args = arguments(70001, state, grad)
    first = None
    for path in native.status().available:
        registry.use_isa(path)
        try:
            for threads in (1, 3):
                monkeypatch.setattr("deepspeed.ops.packing._forced_threads", threads)
                results = stepped(op, args)
                first = first or results
                assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True)), path
        finally:
            registry.use_isa("auto")


@pytest.mark.parametrize("state", [BF16, F32])
def test_native_rounds_as_the_reference(isa, state):
    op = registry.ops()["random_adam_step"]
    args = arguments(4095, state)
    for a, b in zip(stepped(op, args), stepped(op.reference, args), strict=True):
        # the fp32 results differ in their last bits, which decide a rounding once in 2^13 elements or so
        assert a.dtype == F32 or (a != b).sum().item() <= 8
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("path", paths())
def test_rounding_is_unbiased(path):
    registry.use_isa(path)
    try:
        op = registry.ops()["random_adam_step"]
        # one number for all elements: its results are its two bf16 neighbours, in the right proportion
        n = 200_000
        args = [torch.full((n,), x, dtype=BF16) for x in (1.0, 0.3, 0.4, 0.7)]
        exact = [a[:1].float() for a in args[:3]]
        registry.ops()["adam_step"](*exact, args[3][:1].float(), None, *RULE)
        results = stepped(op, args)
    finally:
        registry.use_isa("auto")
    for got, value in zip(results, exact, strict=True):
        spacing = got.float().max() - got.float().min()
        assert 0 < spacing <= 2**-7 * value.abs() * 2
        # five standard deviations of a mean of n draws from two values
        assert (got.double().mean() - value.double()).abs() < 5 * spacing / 2 / n**0.5


def test_the_three_buffers_are_rounded_independently():
    low, high = random_bits.noise(3, 100_000, torch.device("cpu"))
    draws = torch.stack([(bits & 0xFFFF).double() for bits in (low, low >> 16, high)])
    correlation = torch.corrcoef(draws) - torch.eye(3)
    assert correlation.abs().max() < 5 / 100_000**0.5
    assert (draws.mean(1) / 65535 - 0.5).abs().max() < 5 * 0.29 / 100_000**0.5


def test_nan_and_infinity_stay(isa):
    args = arguments(67, BF16)
    args[3][[0, 33]] = float("nan")
    args[3][66] = float("inf")
    results = stepped(registry.ops()["random_adam_step"], args)
    assert all(bool(r[[0, 33]].isnan().all()) for r in results)
    assert bool(results[1][66].isinf()) and bool(results[2][66].isinf())
    assert all(bool(r[1:33].isfinite().all()) for r in results)


def test_small_steps_add_up_only_when_rounded_by_chance():
    moved = {}
    for chance in (False, True):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.ones(5000, dtype=BF16))
        optimizer = DeepSpeedCPUAdam(
            [param], lr=1e-4, fp32_optimizer_states=False, stochastic_rounding=chance
        )
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[chance] = 1 - param.detach().double().mean().item()
    assert moved[False] == 0  # each step is less than half a unit in the last place
    # 20 steps of 1e-4; five standard deviations of the walk, and the bias of bf16 moments by chance is none
    assert moved[True] == pytest.approx(20e-4, rel=0.1)


def test_a_run_is_repeated_by_its_seed_and_by_its_copies():
    def run(seed, optimizer=None):
        torch.manual_seed(seed)
        param = torch.nn.Parameter(torch.linspace(-1, 1, 1000).to(BF16))
        optimizer = DeepSpeedCPUAdam([param], stochastic_rounding=True)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer = copy.deepcopy(optimizer)
        param = optimizer.param_groups[0]["params"][0]
        param.grad = torch.ones_like(param)
        optimizer.step()
        return param.detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_only_bf16_params_are_rounded_by_chance():
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    with pytest.raises(TypeError, match="bf16 params"):
        DeepSpeedCPUAdam([param], stochastic_rounding=True).step()
