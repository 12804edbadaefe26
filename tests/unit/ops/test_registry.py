# SPDX-License-Identifier: Apache-2.0
"""Every op of the registry on every path of the machine, against float64 maths; an op without a case fails."""

from __future__ import annotations

import math

import pytest
import torch

from deepspeed.ops import native, registry
from tests.unit.ops.cases import BF16, CASES, F16, F32, run, worst_excess
from tests.unit.ops.conftest import paths
from tests.unit.ops.exact_cases import EXACT

SIZES = (0, 1, 15, 16, 17, 4095, 1 << 20)
OPS = sorted(registry.ops())
ALL = [(name, mix) for name, case in CASES.items() for mix in case.mixes]
# rounding by chance is in test_random_rounding.py
BY_CHANCE = ["random_adam_step"]


def label(value):
    return (
        "-".join(str(t).removeprefix("torch.") for t in value) if isinstance(value, tuple) else None
    )


def test_every_op_has_a_case():
    assert sorted([*CASES, *EXACT, *BY_CHANCE]) == OPS


@pytest.mark.parametrize(("name", "mix"), ALL, ids=label)
@pytest.mark.parametrize("numel", SIZES)
def test_native_agrees_with_float64_maths(isa, name, mix, numel):
    op, case = registry.ops()[name], CASES[name]
    # one element late: no buffer starts on a vector's boundary
    args = case.make(numel, mix, offset=1)
    for got, expected in zip(run(op, case, args), case.maths(*args), strict=True):
        assert worst_excess(got, expected, op.tolerance.ulps) <= 1


@pytest.mark.parametrize(("name", "mix"), ALL, ids=label)
def test_reference_agrees_with_float64_maths(name, mix):
    op, case = registry.ops()[name], CASES[name]
    args = case.make(4095, mix)
    results = run(op.reference, case, args)
    for got, expected in zip(results, case.maths(*args), strict=True):
        assert worst_excess(got, expected, op.tolerance.ulps) <= 1


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("path", paths())
def test_both_kinds_of_decay(path, decoupled):
    op, case = registry.ops()["adam_step"], CASES["adam_step"]
    args = case.make(4095, (F32, F32, F32, None), decoupled=decoupled)
    registry.use_isa(path)
    try:
        results = run(op, case, args)
    finally:
        registry.use_isa("auto")
    for got, expected in zip(results, case.maths(*args), strict=True):
        assert worst_excess(got, expected, op.tolerance.ulps) <= 1


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.4), (0.5, 0.999)])
def test_small_betas_agree_with_float64_maths(isa, betas):
    op, case = registry.ops()["adam_step"], CASES["adam_step"]
    args = case.make(1000, (F32, F32, F32, None))
    args[6:8] = betas
    for got, expected in zip(run(op, case, args), case.maths(*args), strict=True):
        assert worst_excess(got, expected, op.tolerance.ulps) <= 1


@pytest.mark.parametrize(("name", "mix"), ALL, ids=label)
def test_every_path_gives_the_same_bits(name, mix):
    op, case = registry.ops()[name], CASES[name]
    args = case.make(70001, mix, offset=1)
    first = None
    for path in native.status().available:
        registry.use_isa(path)
        try:
            results = run(op, case, args)
        finally:
            registry.use_isa("auto")
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True)), path


GRAD_AT = {"adam_step": 3, "adagrad_step": 2, "lion_step": 2, "sgd_step": 2, "squared_norm": 0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "mix"), [c for c in ALL if c[0] in GRAD_AT], ids=label)
def test_non_finite_elements_stay_where_they_are(isa, name, mix, bad):
    op, case = registry.ops()[name], CASES[name]
    args = case.make(67, mix)
    sound = run(op, case, args)
    grad = GRAD_AT[name]
    args[grad][[0, 33, 66]] = bad
    results, references = run(op, case, args), run(op.reference, case, args)
    if name == "squared_norm":
        assert torch.equal(results[0].isnan(), references[0].isnan())
        assert not results[0].isfinite()
        return
    spoilt = torch.zeros(67, dtype=torch.bool)
    spoilt[[0, 33, 66]] = True
    for got, reference, before in zip(results, references, sound, strict=True):
        assert torch.equal(got.isnan(), reference.isnan())
        assert torch.equal(got.isinf(), reference.isinf())
        assert torch.equal(got[~spoilt], before[~spoilt])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_16_bit_pattern_survives_widening_and_rounding(isa, dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    momentum, grad = torch.zeros(1 << 16), torch.zeros(1 << 16, dtype=dtype)
    low = torch.empty(1 << 16, dtype=dtype)
    same = patterns.clone()
    registry.ops()["lion_step"](same, momentum, grad, low, 0.0, 0.9, 0.99, 0.0, 1.0)
    for result in (same, low):
        numbers = ~patterns.isnan()
        assert torch.equal(result[numbers].view(torch.int16), patterns[numbers].view(torch.int16))
        assert bool(result[~numbers].isnan().all())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rounding_to_16_bits_is_that_of_torch(isa, dtype):
    # all exponents, halfway cases, subnormals, overflow
    high = torch.arange(0, 1 << 16, dtype=torch.int64) << 16
    low_bits = torch.tensor([0x0000, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xF000])
    bits = (high[:, None] + low_bits).reshape(-1)
    values = bits.to(torch.int32).view(F32)
    param, momentum = values.clone(), torch.zeros_like(values)
    low = torch.empty(values.shape, dtype=dtype)
    registry.ops()["lion_step"](
        param, momentum, torch.zeros_like(values), low, 0.0, 0.9, 0.99, 0.0, 1.0
    )
    expected = values.to(dtype)
    numbers = ~values.isnan()
    assert torch.equal(low[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert bool(low[~numbers].isnan().all())


@pytest.mark.parametrize("name", sorted(CASES))
def test_opcheck(name):
    if not hasattr(torch.library, "opcheck"):
        pytest.skip("torch.library.opcheck came with torch 2.4")
    args = CASES[name].make(5, CASES[name].mixes[0])
    overload = getattr(torch.ops.deepspeed, name).default
    torch.library.opcheck(overload, tuple(args))


def test_the_dispatcher_and_the_direct_call_give_the_same_bits():
    for name, case in CASES.items():
        op = registry.ops()[name]
        args = case.make(100, case.mixes[-1])
        direct = run(op, case, args)
        dispatched = run(getattr(torch.ops.deepspeed, name), case, args)
        assert all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))


def test_equal_strides_of_a_dense_block_are_served_by_native_code():
    op, case = registry.ops()["adam_step"], CASES["adam_step"]
    flat = case.make(2 * 3 * 4 * 5, (F32, F32, F32, None))

    def shaped(tensor):
        return tensor.clone().view(2, 3, 4, 5).to(memory_format=torch.channels_last)

    args = [shaped(a) if isinstance(a, torch.Tensor) else a for a in flat]
    assert op.pack is not None and op.pack(*args) is not None
    op(*args)
    expected = run(op, case, flat)[0]
    assert torch.equal(args[0].contiguous().view(-1), expected)


def test_strided_tensors_are_served_by_the_reference():
    op, case = registry.ops()["adam_step"], CASES["adam_step"]
    flat = case.make(40, (F32, F32, F32, None))
    grid = [torch.zeros(40, 2)[:, 0].copy_(a) if isinstance(a, torch.Tensor) else a for a in flat]
    op(*grid)
    expected = run(op.reference, case, flat)[0]
    assert torch.equal(grid[0], expected)


def test_float64_params_are_served_by_the_reference_in_float64():
    op = registry.ops()["adam_step"]
    args = CASES["adam_step"].make(9, (torch.float64, torch.float64, torch.float64, None))
    expected = CASES["adam_step"].maths(*args)[0].value
    op(*args)
    # a few roundings of float64
    torch.testing.assert_close(args[0], expected, rtol=1e-14, atol=1e-14)


def test_tensors_of_different_sizes_are_refused():
    args = CASES["lion_step"].make(9, (F32, F32, F32, None))
    args[1] = args[1][:8]
    if native.status().route != "native":
        pytest.skip("torch itself refuses them")
    with pytest.raises(ValueError, match="must match"):
        registry.ops()["lion_step"](*args)


def test_routes_name_every_op_and_say_why():
    routes = registry.routes()
    assert sorted(route.name for route in routes) == OPS
    assert all(route.reason and route.route in ("native", "reference") for route in routes)


def test_the_route_is_logged_once(fresh_loader, monkeypatch):
    lines = []
    monkeypatch.setattr(registry.logger, "info", lambda form, *rest: lines.append(form % rest))
    for _ in range(3):
        registry.ops()["squared_norm"](torch.ones(3))
    assert len(lines) == 1
    assert "op squared_norm on cpu" in lines[0]
