# SPDX-License-Identifier: Apache-2.0
"""Each spelling of a product goes through fp32 and comes out no less accurate than torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspeed.accelerator.lowp_products import products_context

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "1")


def _t(*shape: int) -> Tensor:
    return torch.randn(*shape)


SPELLINGS: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "F.linear": (F.linear, [_t(4, 32, 64), _t(48, 64), _t(48)], "linear"),
    "linear_kw": (
        lambda x, w: F.linear(input=x, weight=w, bias=None),
        [_t(64, 64), _t(48, 64)],
        "linear",
    ),
    "matmul": (torch.matmul, [_t(4, 32, 64), _t(4, 64, 48)], "matmul"),
    "at": (lambda a, b: a @ b, [_t(64, 64), _t(64, 48)], "linear"),
    "method": (lambda a, b: a.matmul(b), [_t(2, 3, 32, 64), _t(2, 3, 64, 48)], "matmul"),
    "rmatmul": (lambda a, b: Tensor.__rmatmul__(b, a), [_t(64, 64), _t(64, 48)], "linear"),
    "mm": (torch.mm, [_t(64, 64), _t(64, 48)], "linear"),
    "bmm": (lambda a, b: a.bmm(b), [_t(4, 32, 64), _t(4, 64, 48)], "matmul"),
    "addmm": (torch.addmm, [_t(48), _t(64, 64), _t(64, 48)], "linear"),
    "addmm_matrix": (
        lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2),
        [_t(64, 48), _t(64, 64), _t(64, 48)],
        "",
    ),
    "baddbmm": (torch.baddbmm, [_t(4, 32, 48), _t(4, 32, 64), _t(4, 64, 48)], ""),
    "einsum": (
        lambda a, b: torch.einsum("bik,bkj->bij", a, b),
        [_t(4, 32, 64), _t(4, 64, 48)],
        "",
    ),
    "matmul_kw": (lambda a, b: torch.matmul(input=a, other=b), [_t(64, 64), _t(64, 48)], ""),
    "conv1d": (
        lambda x, w: F.conv1d(x, w, None, 1, 2),
        [_t(4, 8, 64), _t(16, 8, 5)],
        "convolution",
    ),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=1, dilation=2, groups=2),
        [_t(4, 8, 16, 16), _t(16, 4, 3, 3), _t(16)],
        "convolution",
    ),
    "conv2d_same": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        [_t(4, 8, 16, 16), _t(16, 8, 3, 3)],
        "",
    ),
    "conv2d_unbatched": (F.conv2d, [_t(8, 16, 16), _t(16, 8, 3, 3)], ""),
    "conv3d": (F.conv3d, [_t(2, 3, 8, 8, 8), _t(4, 3, 3, 3, 3)], "convolution"),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1),
        [_t(2, 8, 9, 9), _t(8, 4, 4, 4)],
        "convolution",
    ),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [_t(2, 4, 48, 16) for _ in range(3)],
        "attention",
    ),
    "attention_gqa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [_t(2, 4, 48, 16), _t(2, 2, 48, 16), _t(2, 2, 48, 16)],
        "",
    ),
    "attention_3d": (
        F.scaled_dot_product_attention,
        [_t(4, 48, 16) for _ in range(3)],
        "",
    ),
    "bilinear": (F.bilinear, [_t(64, 16), _t(64, 16), _t(32, 16, 16)], ""),
}


if "enable_gqa" not in (F.scaled_dot_product_attention.__doc__ or ""):  # torch < 2.5
    del SPELLINGS["attention_gqa"]


def _run(call: Callable[..., Tensor], tensors: list[Tensor], seed: Tensor | None) -> list[Tensor]:
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    out = call(*inputs)
    seed = torch.ones_like(out) if seed is None else seed.to(out.dtype)
    return [t.detach() for t in (out, *torch.autograd.grad(out, inputs, seed))]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_sent_and_is_no_less_accurate(
    name: str, dtype: torch.dtype, sent: list[str]
) -> None:
    call, tensors, product = SPELLINGS[name]
    low = [t.to(dtype) for t in tensors]
    seed = torch.randn_like(call(*low))
    exact = _run(call, [t.double() for t in low], seed)
    native_results = _run(call, low, seed)
    with products_context(nn.Linear(1, 1, dtype=dtype), torch.device("cpu")):
        ours = _run(call, low, seed)
    assert sent == ([product] if product else [])
    for found, other, want in zip(ours, native_results, exact, strict=True):
        assert found.dtype is dtype and found.shape == other.shape
        mine, theirs = (found.double() - want).norm(), (other.double() - want).norm()
        # one rounding at least as good as theirs; two of the same size differ by chance, by a few %
        assert mine <= 1.05 * theirs + 1e-12
        assert mine <= torch.finfo(dtype).eps / 2 * want.norm()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
        lambda: nn.LSTM(32, 48, batch_first=True),
        lambda: nn.GRU(32, 48, num_layers=2, batch_first=True),
    ],
    ids=["multihead", "encoder", "lstm", "gru"],
)
def test_composite_modules_are_no_less_accurate(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model, x = make().to(dtype), torch.randn(3, 24, 32).to(dtype)

    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
        out = model(*args)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.double().square().sum(), list(model.parameters()))]

    exact = run(copy.deepcopy(model).double(), x.double())
    native_results = run(model, x)
    products = products_context(model, torch.device("cpu"))
    ours = run(model, x)
    products.release()
    noise = 1e-3 * max(
        want.norm() for want in exact
    )  # some gradients (a key's bias) are noise around 0
    for found, other, want in zip(ours, native_results, exact, strict=True):
        assert found.dtype is dtype
        assert (found - want).norm() <= 1.1 * (other - want).norm() + noise


def test_results_of_a_training_step_follow_fp32(sent: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 10))
    twin = copy.deepcopy(model.half()).float()
    x, y = torch.randn(16, 3, 12, 12).half().float(), torch.randint(10, (16,))
    products_context(model, torch.device("cpu"))
    F.cross_entropy(model(x.half()).float(), y).backward()
    F.cross_entropy(twin(x), y).backward()
    assert sent == ["convolution", "linear"]
    for mine, want in zip(model.parameters(), twin.parameters(), strict=True):
        # a handful of fp16 roundings (2^-11 each) between input and gradient
        assert (mine.grad.float() - want.grad).norm() <= 5e-3 * want.grad.norm()
