# SPDX-License-Identifier: Apache-2.0
"""The optimizer and norm kernels, run on the CPU through the loader, against the references and float64."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops import cuda_optim, rules
from deepspeed.ops.cuda_optim import CHUNK, AdamRule, Gradients, LambRule, TensorLists
from deepspeed.ops.lamb.fused_lamb import lamb_step

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# below, at and over the four elements of a load, a block and a chunk
SIZES = (1, 3, 4, 5, 257, CHUNK - 1, CHUNK, CHUNK + 5)
# param, moments, gradient, low copy
MIXES = (
    (F32, F32, F32, None),
    (F32, F32, BF16, BF16),
    (F32, F32, F16, F16),
    (BF16, BF16, BF16, None),
    (F16, F16, F16, None),
    (BF16, F32, BF16, F16),
)
# one rounding to 16 bits, or a few in fp32 of the largest term; both sides round at the same places
RELATIVE = {F32: 2e-6, BF16: 2**-7, F16: 2**-10}


def tensors(sizes, mix, offset=0):
    """Return lists for params, first, second, grads, lows; each tensor starts `offset` elements late."""
    made = []
    for role, dtype in enumerate((mix[0], mix[1], mix[1], mix[2], mix[3])):
        row = [
            None if dtype is None else torch.randn(size + offset).to(dtype)[offset:]
            for size in sizes
        ]
        made.append([t.abs() if role == 2 else t for t in row])
    return made


def close(got, wanted):
    scale = wanted.double().abs().max().clamp_min(1e-6).item() if wanted.numel() else 1.0
    # elements whose terms cancel keep the error of the largest term
    torch.testing.assert_close(
        got.double(), wanted.double(), rtol=RELATIVE[got.dtype], atol=RELATIVE[got.dtype] * scale
    )


def copies(lists):
    return [[None if t is None else t.clone() for t in row] for row in lists]


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("decoupled", (True, False))
def test_adam_of_many_sizes_in_one_launch_agrees_with_the_reference(
    kernels, mix, decoupled, offset
):
    p, m, v, g, low = tensors(SIZES, mix, offset)
    expected = copies((p, m, v, g, low))
    for row in zip(*expected, strict=True):
        rules.adam_step.reference(*row, 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, decoupled, True, 0.5)
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, decoupled)
    assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v, low), rule, Gradients(0.5))
    assert len(kernels.calls("cuLaunchKernel")) == 1
    for got, wanted in zip((p, m, v, low), (expected[i] for i in (0, 1, 2, 4)), strict=True):
        for one, other in zip(got, wanted, strict=True):
            if one is not None:
                close(one, other)


@pytest.mark.parametrize("mix", MIXES)
def test_lion_and_adagrad_agree_with_their_references(kernels, mix):
    for name, numbers in (("lion", (1e-2, 0.9, 0.99, 0.1)), ("adagrad", (1e-2, 1e-10, 0.1))):
        p, m, v, g, low = tensors(SIZES, mix)
        state = m if name == "lion" else v
        if name == "lion":  # away from 0, where a sign is a matter of rounding
            g = [torch.where(a < 0, -b.abs(), b.abs()) for a, b in zip(m, g, strict=True)]
        expected = copies((p, state, g, low))
        for row in zip(*expected, strict=True):
            getattr(rules, f"{name}_step").reference(*row, *numbers, 0.5)
        for row in zip(p, state, g, low, strict=True):
            assert getattr(cuda_optim, f"{name}_step")(*row, *numbers, 0.5) is None
        for got, wanted in zip((p, state, low), (expected[i] for i in (0, 1, 3)), strict=True):
            for one, other in zip(got, wanted, strict=True):
                if one is not None:
                    close(one, other)


def test_lion_leaves_an_element_without_direction_where_it_is(kernels):
    p = torch.ones(5)
    assert cuda_optim.multi_tensor_lion(
        TensorLists([p], [torch.zeros(5)], [torch.zeros(5)]), 0.1, (0.9, 0.99), 0.0
    )
    assert torch.equal(p, torch.ones(5))


@pytest.mark.parametrize("mix", MIXES[:5])
@pytest.mark.parametrize("inside", (False, True))
def test_lamb_agrees_with_the_reference_param_by_param(kernels, mix, inside):
    sizes = (5, 300, 0, CHUNK + 3)
    p, m, v, g, low = tensors(sizes, mix)
    p[0].zero_()  # a norm of 0 gives the ratio 1
    expected = copies((p, low, m, v, g))
    numbers = (0.1, 0.9, 0.99, 10.0, 0.01, 1e-6, 2.0, 2, 0 if inside else 1, True, 0.1)
    wanted = [lamb_step(*row, *numbers) for row in zip(*expected, strict=True)]
    rule = LambRule(0.1, 0.9, 0.99, 1e-6, 0.1, 2, 0.01, 10.0, inside)
    ratios = cuda_optim.multi_tensor_lamb(TensorLists(p, g, m, v, low), rule, Gradients(0.5))
    # moments of 16 bits are rounded before our update is made from them: one rounding more
    loose = 4 * RELATIVE[mix[1]] + 1e-5
    torch.testing.assert_close(ratios, torch.cat(wanted), rtol=loose, atol=0)
    assert ratios[0] == 1 and ratios[2] == 1
    for one, other in zip(p + m + v, expected[0] + expected[2] + expected[3], strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=loose, atol=2 * loose)


def test_a_set_noop_leaves_everything_as_it_is(kernels):
    p, m, v, g, _ = tensors((10,), MIXES[0])
    before = copies((p, m, v))
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 1, True)
    stop = Gradients(noop=torch.ones(1, dtype=torch.int32))
    assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v), rule, stop)
    assert all(torch.equal(a[0], b[0]) for a, b in zip((p, m, v), before, strict=True))
    go = Gradients(noop=torch.zeros(1, dtype=torch.int32))
    assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v), rule, go)
    assert not torch.equal(p[0], before[0][0])


def test_the_factor_on_the_device_scales_like_the_number(kernels):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 1, False)
    lists = tensors((1000,), MIXES[0])
    twin = copies(lists)
    for (p, m, v, g, _), gradients in (
        (lists, Gradients(0.5, torch.tensor([0.25]))),
        (twin, Gradients(0.125)),
    ):
        assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v), rule, gradients)
    assert torch.equal(lists[0][0], twin[0][0])


@pytest.mark.parametrize("dtype", (F32, BF16, F16, torch.float64))
@pytest.mark.parametrize("offset", (0, 1))
def test_squared_norms_agree_with_float64(kernels, dtype, offset):
    xs = [torch.randn(size + offset).to(dtype)[offset:] for size in (0, *SIZES)]
    got = cuda_optim.squared_norms(xs)
    wanted = torch.stack([x.double().square().sum() for x in xs])
    # sums of up to 8,000 positive terms in another order
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_tensors_with_a_nan_or_infinity_are_counted(kernels):
    xs = [torch.ones(10), torch.full((3,), float("inf")), torch.tensor([1.0, float("nan")])]
    bad = torch.zeros(1, dtype=torch.int32)
    sums = cuda_optim.squared_norms(xs, bad)
    assert bad.item() == 2
    assert sums[0] == 10 and sums[1] == float("inf") and sums[2].isnan()


def test_bf16_and_f16_conversions_round_as_torch_does(kernels):
    # every 16-bit pattern, and for each the middle to its neighbour and a hair off the middle
    for dtype in (BF16, F16):
        patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        every = patterns.view(dtype).float()
        every = every[every.isfinite()].sort().values
        middle = (every[1:].double() + every[:-1].double()).div(2).float()
        x = torch.cat([every, middle, middle * (1 + 2e-7), torch.tensor([1e30, -1e30, 1e-44])])
        p, low = x.clone(), torch.empty_like(x, dtype=dtype)
        zeros = [torch.zeros_like(x)]
        lists = TensorLists([p], zeros, [torch.zeros_like(x)], None, [low])
        assert cuda_optim.multi_tensor_lion(lists, 0.0, (0.9, 0.99), 0.0)
        assert torch.equal(low, x.to(dtype))
        wide = torch.empty_like(x)
        lists = TensorLists([low], zeros, [torch.zeros_like(x)], None, [wide])
        assert cuda_optim.multi_tensor_lion(lists, 0.0, (0.9, 0.99), 0.0)
        assert torch.equal(wide, low.float())


def test_mismatched_sizes_are_refused_and_strange_strides_left_to_torch(kernels):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 1, True)
    p, m, v, g, _ = tensors((12,), MIXES[0])
    with pytest.raises(ValueError, match="must match: got .3,."):
        cuda_optim.multi_tensor_adam(TensorLists(p, [torch.ones(3)], m, v), rule)
    strided = [torch.ones(24)[::2]]
    assert not cuda_optim.multi_tensor_adam(TensorLists(strided, g, m, v), rule)
    wide = [torch.ones(12, dtype=torch.float64)]
    assert not cuda_optim.multi_tensor_adam(TensorLists(wide, g, m, v), rule)
    assert kernels.calls("cuLaunchKernel") == []


def test_transposed_tensors_with_equal_strides_are_served(kernels):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 1, True)
    p, m, v, g = (torch.rand(6, 5).t() for _ in range(4))
    twin = [t.clone() for t in (p, m, v, g)]
    assert cuda_optim.multi_tensor_adam(TensorLists([p], [g], [m], [v]), rule)
    rules.adam_step.reference(*twin, None, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1, True, True, 1.0)
    close(p, twin[0])


def test_no_tensors_and_empty_tensors_launch_nothing(kernels):
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 1, True)
    assert cuda_optim.multi_tensor_adam(TensorLists([], [], [], []), rule)
    none = [torch.empty(0)]
    assert cuda_optim.multi_tensor_adam(TensorLists(none, none, none, none), rule)
    assert kernels.calls("cuLaunchKernel") == []


def test_the_table_is_built_again_only_when_a_tensor_moved(kernels, monkeypatch):
    built = []
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: built.append(1) or real(*a, **k))
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 1, True)
    p, m, v, g, _ = tensors((50,), MIXES[0])
    for _ in range(3):
        assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v), rule)
    assert len(built) == 1
    kernels.torch.handle = 8  # another stream may overlap with the upload on the first
    assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v), rule)
    g = [g[0].clone()]
    assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v), rule)
    assert len(built) == 3
