# SPDX-License-Identifier: Apache-2.0
"""The products themselves, against float64 and against torch's own low-precision products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepspeed.accelerator import product_functions as through
from tests.helpers.launching import UNDER_WINE

LOW = [torch.bfloat16, torch.float16]


def _leaves(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Random tensors whose values fit the smallest of the dtypes compared."""
    return [torch.randn(s).to(dtype) for s in shapes]


def _run(call: Callable[..., Tensor], tensors: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The result and the gradient of each tensor, all in float64."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*inputs)
    found = torch.autograd.grad(out, inputs, seed.to(out.dtype))
    return [t.detach().double() for t in (out, *found)]


LINEAR = {
    "plain": [(64, 96), (80, 96), (80,)],
    "no_bias": [(64, 96), (80, 96)],
    "batched": [(3, 5, 7, 96), (80, 96), (80,)],
    "vector": [(96,), (80, 96), (80,)],
    "wide_head": [(16, 48), (3000, 48), (3000,)],
    "one_row": [(1, 96), (80, 96)],
}


@pytest.mark.parametrize("block", [1 << 20, 1 << 10], ids=["one_piece", "blocks"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", LINEAR)
def test_linear_rounds_the_exact_result_once(
    case: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(through, "_BLOCK", block)
    monkeypatch.setattr(through, "_MIN_ROWS", 16)
    tensors = _leaves(LINEAR[case], dtype)
    seed = torch.randn(*tensors[0].shape[:-1], tensors[1].shape[0]).to(dtype)
    exact = _run(F.linear, [t.double() for t in tensors], seed.double())
    ours = _run(through.linear, tensors, seed)
    for found, want in zip(ours, exact, strict=True):
        # half a unit in the last place, and what fp32 sums of a few thousand terms of size ~1 may be off by
        bound = torch.finfo(dtype).eps / 2 * want.abs() + 2e-4 * want.abs().mean() + 1e-7
        assert (found - want).abs().le(bound).all()


MATMUL = {
    "matrices": [(40, 64), (64, 48)],
    "batches": [(6, 40, 64), (6, 64, 48)],
    "heads": [(2, 3, 40, 64), (2, 3, 64, 48)],
    "shared_right": [(6, 40, 64), (64, 48)],
    "shared_left": [(40, 64), (6, 64, 48)],
    "broadcast": [(2, 1, 40, 64), (3, 64, 48)],
    "vector_left": [(64,), (6, 64, 48)],
    "vector_right": [(6, 40, 64), (64,)],
    "dot": [(64,), (64,)],
    "empty_batch": [(0, 40, 64), (0, 64, 48)],
    "no_rows": [(0, 64), (64, 48)],
    "no_terms": [(5, 0), (0, 4)],
}


@pytest.mark.parametrize("block", [1 << 20, 1 << 10], ids=["one_piece", "groups"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", MATMUL)
def test_matmul_rounds_the_exact_result_once(
    case: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(through, "_BLOCK", block)
    tensors = _leaves(MATMUL[case], dtype)
    seed = torch.randn_like(torch.matmul(*tensors))
    exact = _run(torch.matmul, [t.double() for t in tensors], seed.double())
    ours = _run(through.matmul, tensors, seed)
    for found, want in zip(ours, exact, strict=True):
        assert found.shape == want.shape
        if want.numel():
            bound = torch.finfo(dtype).eps / 2 * want.abs() + 2e-4 * want.abs().mean() + 1e-7
            assert (found - want).abs().le(bound).all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded"])
def test_operands_of_any_strides(dtype: torch.dtype, layout: str) -> None:
    make = {
        "transposed": lambda: torch.randn(64, 48).to(dtype).t(),
        "every_second": lambda: torch.randn(96, 128).to(dtype)[::2, ::2],
        "expanded": lambda: torch.randn(1, 64).to(dtype).expand(48, 64),
    }[layout]
    x, w, seed = make(), make(), torch.randn(48, 48).to(dtype)
    exact = _run(F.linear, [x.double(), w.double()], seed.double())
    for found, want in zip(_run(through.linear, [x, w], seed), exact, strict=True):
        bound = torch.finfo(dtype).eps / 2 * want.abs() + 1e-4 * want.abs().mean() + 1e-6
        assert (found - want).abs().le(bound).all()


def test_gradient_of_a_transposed_weight_has_its_order() -> None:
    w = torch.randn(64, 48, dtype=torch.bfloat16, requires_grad=True)
    (found,) = torch.autograd.grad(through.matmul(torch.randn(8, 64).bfloat16(), w).sum(), w)
    assert found.stride() == w.stride()


# dims, groups, (stride, padding, dilation, transposed, output padding, groups)
CONVOLUTION = {
    "1d": ([(4, 6, 40), (8, 6, 5), (8,)], ([1], [0], [1], False, [0], 1)),
    "2d": ([(4, 3, 16, 16), (8, 3, 5, 5), (8,)], ([1, 1], [2, 2], [1, 1], False, [0, 0], 1)),
    "strided_grouped": (
        [(2, 8, 15, 15), (12, 4, 3, 3)],
        ([2, 2], [1, 1], [2, 2], False, [0, 0], 2),
    ),
    "3d": (
        [(2, 3, 8, 8, 8), (4, 3, 3, 3, 3), (4,)],
        ([1, 1, 1], [1, 1, 1], [1, 1, 1], False, [0, 0, 0], 1),
    ),
    "transposed": ([(2, 6, 9, 9), (6, 4, 4, 4), (4,)], ([2, 2], [1, 1], [1, 1], True, [1, 1], 1)),
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", CONVOLUTION)
def test_convolution_rounds_the_exact_result_once(case: str, dtype: torch.dtype) -> None:
    shapes, how = CONVOLUTION[case]
    tensors = _leaves(shapes, dtype)
    bias = [] if len(tensors) == 3 else [None]
    seed = torch.randn_like(torch.convolution(*(t.float() for t in tensors), *bias, *how))
    exact = _run(
        lambda *t: torch.convolution(*t, *bias, *how),
        [t.double() for t in tensors],
        seed.to(dtype).double(),
    )
    ours = _run(lambda *t: through.convolution(*t, *bias, how), tensors, seed)
    for found, want in zip(ours, exact, strict=True):
        # fp32 convolutions may use transformed (Winograd) sums: a little further off than plain ones
        bound = torch.finfo(dtype).eps / 2 * want.abs() + 5e-4 * want.abs().mean() + 1e-6
        assert (found - want).abs().le(bound).all()


def _mask(kind: str, rows: int) -> Tensor | None:
    if kind == "boolean":
        return torch.rand(2, 1, rows, rows) < 0.7
    return torch.randn(rows, rows) if kind == "additive" else None


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive"])
def test_attention_is_no_worse_than_torch(kind: str, dtype: torch.dtype) -> None:
    shape, causal = (2, 4, 48, 16), kind == "causal"
    tensors, seed = _leaves([shape] * 3, dtype), torch.randn(shape).to(dtype)
    mask = _mask(kind, 48)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    wide = mask.double() if mask is not None and mask.dtype is dtype else mask

    def torchs(mask: Tensor | None) -> Callable[..., Tensor]:
        return lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask, is_causal=causal)

    exact = _run(torchs(wide), [t.double() for t in tensors], seed.double())
    native = _run(torchs(mask), tensors, seed)
    ours = _run(lambda *t: through.attention(*t, mask, causal, None), tensors, seed)
    for found, other, want in zip(ours, native, exact, strict=True):
        # two roundings of the same size differ by chance: 5 % over a thousand values
        assert (found - want).norm() <= 1.05 * (other - want).norm()
        assert (found - want).norm() <= torch.finfo(dtype).eps * want.norm()


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rows", [2, 256], ids=["blocks", "one_piece"])
def test_first_and_second_derivatives_in_double(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through, "_BLOCK", 8)
    monkeypatch.setattr(through, "_MIN_ROWS", rows)
    conv = ([2, 1], [1, 0], [1, 1], False, [0, 0], 1)
    for call, inputs in (
        (through.linear, (_double(2, 3, 4), _double(7, 4), _double(7))),
        (through.matmul, (_double(3, 2, 4), _double(3, 4, 5))),
        (through.matmul, (_double(2, 1, 2, 3), _double(2, 3, 2))),
        (through.matmul, (_double(4), _double(2, 4, 3))),
        (
            lambda x, w, b: through.convolution(x, w, b, conv),
            (_double(2, 2, 5, 4), _double(3, 2, 3, 2), _double(3)),
        ),
    ):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_attention_gradient_in_double() -> None:
    inputs = tuple(_double(1, 2, 4, 8) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda q, k, v: through.attention(q, k, v, None, True, None), inputs
    )


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("_input_gradient", "_weight_gradient"):
        real = getattr(through, name)
        monkeypatch.setattr(
            through, name, lambda *a, real=real, name=name: (asked.append(name), real(*a))[1]
        )
    x, w, bias = (t.bfloat16() for t in (torch.randn(8, 16), torch.randn(4, 16), torch.randn(4)))
    through.linear(x, w.requires_grad_(), bias).sum().backward()
    assert asked == ["_weight_gradient"]
    asked.clear()
    through.linear(x.requires_grad_(), w.detach(), bias).sum().backward()
    assert asked == ["_input_gradient"]
    asked.clear()
    through.linear(x.detach(), w.detach(), bias.requires_grad_()).sum().backward()
    assert asked == [] and torch.equal(bias.grad, torch.full((4,), 8.0, dtype=torch.bfloat16))


def test_saved_tensors_are_the_operands_themselves() -> None:
    saved: list[Tensor] = []
    x = torch.randn(8, 16).bfloat16().requires_grad_()
    w = torch.randn(4, 16).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        through.linear(x, w)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), w.data_ptr()]


def test_backward_runs_twice_over_a_kept_graph() -> None:
    x = torch.randn(8, 16).half().requires_grad_()
    out = through.linear(x, torch.randn(4, 16).half()).sum()
    out.backward(retain_graph=True)
    once = x.grad.clone()
    out.backward()
    assert torch.equal(x.grad, 2 * once)


@pytest.mark.skipif(UNDER_WINE, reason="an error inside backward ends the process under Wine")
def test_a_weight_changed_before_backward_is_an_error() -> None:
    w = torch.randn(4, 16).half().requires_grad_()
    out = through.linear(torch.randn(8, 16).half().requires_grad_(), w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_does_not_reach_the_copies() -> None:
    x, w = torch.randn(32, 64).half().requires_grad_(), torch.randn(48, 64).half()
    plain = through.linear(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = through.linear(x, w)
        (inside,) = torch.autograd.grad(cast.sum(), x)
    (outside,) = torch.autograd.grad(plain.sum(), x)
    assert torch.equal(cast, plain) and torch.equal(inside, outside)
