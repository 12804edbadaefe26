# SPDX-License-Identifier: Apache-2.0
"""Which products of which models go through fp32, and that everything around them stays as it was."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepspeed.accelerator import lowp_products
from deepspeed.accelerator.lowp_products import Products, lacking, native, products_context
from tests.helpers.launching import UNDER_WINE

LOW = [torch.bfloat16, torch.float16]
BF16 = frozenset({torch.bfloat16})


@pytest.fixture(autouse=True)
def _on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "1")
    yield
    assert not lowp_products._entered()


class Block(nn.Module):
    """A linear, a product of bare tensors and a norm."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bare = nn.Parameter(torch.randn(width, width) / 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.norm(torch.tanh(self.fc(x)) @ self.bare) * scale


def _x(rows: int = 32, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, 64).to(dtype)


# ------------------------------------------------------------------ what is left alone
def test_other_dtypes_small_products_and_foreign_tensors_stay_native(sent: list[str]) -> None:
    with Products(nn.Identity(), BF16):
        F.linear(_x(dtype=torch.float32), torch.randn(64, 64))
        F.linear(_x(dtype=torch.float16), torch.randn(64, 64).half())
        F.linear(_x(2).requires_grad_(), torch.randn(4, 64).bfloat16())
        F.linear(_x(0).requires_grad_(), torch.randn(64, 64).bfloat16())
        F.linear(torch.empty(64, 64, dtype=torch.bfloat16, device="meta"), _meta_weight())
        torch.matmul(_x(64), torch.randn(64, 64).bfloat16(), out=_x(64))
        torch.func.vmap(torch.mv)(torch.randn(64, 64, 64).bfloat16(), _x(64))
        torch.func.vmap(torch.mm)(_x(8192).view(128, 64, 64), _x(8192).view(128, 64, 64))
    assert sent == []


def _meta_weight() -> Tensor:
    return torch.empty(64, 64, dtype=torch.bfloat16, device="meta")


@pytest.mark.skipif(UNDER_WINE, reason="an error inside a torch kernel ends the process under Wine")
@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(_x(), torch.randn(64, 64)),
        lambda: F.linear(_x(), torch.randn(64, 63).bfloat16()),
        lambda: torch.mm(_x(), torch.randn(3, 64, 64).bfloat16()),
        lambda: _x() @ torch.randn(63, 64).bfloat16(),
        lambda: F.conv2d(_x(), torch.randn(4, 4, 3, 3).bfloat16()),
    ],
    ids=["mixed", "sizes", "rank", "at", "conv"],
)
def test_errors_are_torchs_own(call: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError) as plain:
        call()
    with Products(nn.Identity(), BF16), pytest.raises(RuntimeError) as ours:
        call()
    assert type(ours.value) is type(plain.value)


def test_only_the_owned_model_is_touched(sent: list[str]) -> None:
    mine, other = Block().bfloat16(), Block().bfloat16()
    products_context(mine, torch.device("cpu"))
    other(_x()).sum().backward()
    assert sent == [] and "forward" not in vars(other)
    mine(_x()).sum().backward()
    assert sent == ["linear", "linear"]
    other(_x())
    assert sent == ["linear", "linear"]


def test_submodules_called_by_themselves_are_covered(sent: list[str]) -> None:
    model = nn.Sequential(Block(), Block()).bfloat16()
    products_context(model, torch.device("cpu"))
    model[1].fc(_x(64).requires_grad_())
    assert sent == ["linear"]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard: Callable[[], object], sent: list[str]) -> None:
    model = Block(128).bfloat16().eval()
    x = torch.randn(32, 128).bfloat16()
    with guard():
        want = model(x)
        products_context(model, torch.device("cpu"))
        found = model(x)
        assert sent == ["linear", "linear"] and not found.requires_grad
        # a few bf16 roundings of values of size 1 to 3
        assert torch.allclose(found.float(), want.float(), atol=0.05, rtol=0.02)
        sent.clear()
        model(x[:1])  # one row, as in generation: the copies would not pay
    assert sent == []


def test_release_and_errors_leave_nothing_behind(sent: list[str]) -> None:
    model = Block().bfloat16()
    products = products_context(model, torch.device("cpu"))
    with pytest.raises(TypeError):
        model(_x(), wrong=1)
    with products, pytest.raises(RuntimeError), products:
        model(_x()[:, :3])
    assert not lowp_products._entered()
    for part in model.modules():
        if "forward" in vars(part):
            assert isinstance(part.forward, lowp_products._Entering)
    products.release()
    products.release()
    assert not any("forward" in vars(part) for part in model.modules())
    sent.clear()
    model(_x())
    assert sent == []


def test_release_gives_a_users_own_forward_back() -> None:
    model = Block().bfloat16()
    mine = model.forward = lambda x: x + 1
    products = products_context(model, torch.device("cpu"))
    assert model(torch.zeros(1)).item() == 1
    products.release()
    assert model.forward is mine


def test_copies_and_pickles_are_plain_and_their_own(sent: list[str]) -> None:
    model = Block().bfloat16()
    products_context(model, torch.device("cpu"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for other in others:
        with torch.no_grad():
            other.fc.weight.zero_(), other.fc.bias.zero_()
        assert other(_x()).float().abs().max() <= other.norm.bias.float().abs().max() + 1e-6
    assert sent == []
    assert model(_x()).float().abs().max() > 0.1


def test_signature_is_the_modules_own() -> None:
    model = Block().bfloat16()
    want = inspect.signature(model.forward)
    products_context(model, torch.device("cpu"))
    assert inspect.signature(model.forward) == want
    assert model.forward.__func__ is Block.forward
    assert model(_x(), scale=0.0).abs().max() == 0


def test_each_thread_has_its_own(sent: list[str]) -> None:
    inside, outside = [], []

    def other_thread() -> None:
        outside.append(lowp_products._entered())
        Block().bfloat16()(_x())

    with Products(nn.Identity(), BF16) as products:
        with products:
            inside.append(lowp_products._entered())
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        inside.append(lowp_products._entered())
    assert inside == [True, True] and outside == [False] and sent == []


# ------------------------------------------------------------------ the switch
def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowp_products, "native", lambda dtype: dtype is torch.float16)
    every = [torch.float32, torch.bfloat16, torch.float16, None]
    monkeypatch.delenv("DS_LOWP_PRODUCTS")
    assert lacking(every) == BF16
    for text, want in (("auto", BF16), ("0", set()), ("off", set()), ("1", set(LOW))):
        monkeypatch.setenv("DS_LOWP_PRODUCTS", text)
        assert lacking(every) == want
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "perhaps")
    with pytest.raises(ValueError, match=r"DS_LOWP_PRODUCTS.*perhaps"):
        lacking(every)


def test_off_and_not_needed_do_nothing(monkeypatch: pytest.MonkeyPatch, sent: list[str]) -> None:
    model = Block().bfloat16()
    cpu = torch.device("cpu")
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "0")
    for products in (
        products_context(model, cpu),
        products_context(model, torch.device("meta")),
    ):
        with products:
            model(_x()).sum().backward()
        assert products.dtypes == frozenset() and "forward" not in vars(model)
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "1")
    assert products_context(Block(), cpu).dtypes == frozenset()
    assert products_context(Block(), cpu, {torch.float16, None}).dtypes == {torch.float16}
    assert sent == []


def test_native_follows_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.mkldnn.is_available():
        assert native(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert native(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    monkeypatch.setitem(lowp_products._SUPPORT, torch.float16, "_no_such_op")
    assert native(torch.float16) is False
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert native(torch.bfloat16) is False


# ------------------------------------------------------------------ checkpointing
def _bare(model: Block) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.tanh(F.linear(torch.tanh(h), model.bare)) @ model.bare


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
@pytest.mark.parametrize("body", ["module", "function"])
def test_recomputation_runs_as_the_forward_did(body: str, reentrant: bool, sent: list[str]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(128)
            self.checkpointed = True

        def forward(self, x: Tensor) -> Tensor:
            region = self.block if body == "module" else _bare(self.block)
            return (
                checkpoint(region, x, use_reentrant=reentrant) if self.checkpointed else region(x)
            )

    model = Outer().bfloat16()
    products_context(model, torch.device("cpu"))
    results, counts = [], []
    for model.checkpointed in (False, True):
        x = torch.ones(64, 128, dtype=torch.bfloat16, requires_grad=True)
        model.zero_grad()
        model(x).float().square().sum().backward()
        results.append([x.grad, model.block.bare.grad.clone()])
        counts.append(len(sent))
        sent.clear()
    if body == "module" or not reentrant:
        assert counts == [2, 4]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    else:  # bare products under the reentrant kind are recomputed by torch: equal but for a rounding
        assert counts == [2, 2]
        for mine, want in zip(*results, strict=True):
            assert (mine.float() - want.float()).norm() <= 0.02 * want.float().norm()


def test_nested_checkpoints_of_bare_tensors(sent: list[str]) -> None:
    model = Block(128).half()
    region = _bare(model)

    def outer(h: Tensor) -> Tensor:
        return checkpoint(region, checkpoint(region, h, use_reentrant=False), use_reentrant=False)

    x = torch.randn(64, 128).half().requires_grad_()
    with Products(nn.Identity(), frozenset({torch.float16})):
        plain = region(region(x))
        nested = checkpoint(outer, x, use_reentrant=False)
    (want,) = torch.autograd.grad(plain.sum(), x)
    sent.clear()
    (found,) = torch.autograd.grad(nested.sum(), x)
    assert torch.equal(found, want)
    assert len(sent) >= 4  # all of the outer region once, what the inner ones need besides


# ------------------------------------------------------------------ autocast, compilation, transforms
def test_autocast_products_are_sent_too(sent: list[str]) -> None:
    model = Block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(_x(dtype=torch.float32))
        products_context(model, torch.device("cpu"), {torch.bfloat16})
        found = model(_x(dtype=torch.float32) * 0 + 1)
        model.fc(_x(dtype=torch.float32))
        einsum = model.bare.new_ones(4, 64, 64)
        with Products(nn.Identity(), BF16):
            assert torch.einsum("bij,bjk->bik", einsum, einsum).dtype is torch.bfloat16
    found.sum().backward()
    assert found.dtype == want.dtype and model.fc.weight.grad.dtype is torch.float32
    assert sent == ["linear"] * 3


def test_autocast_to_another_dtype_is_left_alone(sent: list[str]) -> None:
    half = Products(nn.Identity(), frozenset({torch.float16}))
    with half, torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.linear(_x(dtype=torch.float32), torch.randn(64, 64))
    assert out.dtype is torch.bfloat16 and sent == []


@pytest.mark.parametrize("part", ["whole", "child"])
def test_compiled_modules_are_left_to_the_compiler(part: str) -> None:
    model = nn.Sequential(Block(), Block()).bfloat16()
    want = model(_x() * 0 + 0.5)
    products = products_context(model, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, different in each version
        if part == "whole":
            compiled = torch.compile(model, backend="eager")
        else:
            model[1] = torch.compile(model[1], backend="eager")
            compiled = model
        with products:
            found = compiled(_x() * 0 + 0.5)
        found.sum().backward()
    torch._dynamo.reset()
    # bf16 roundings of values of size 1 to 3
    assert torch.allclose(found.float(), want.float(), atol=0.05, rtol=0.02)


def test_second_derivative_inside_a_model() -> None:
    model = nn.Linear(64, 64).bfloat16()
    products_context(model, torch.device("cpu"))
    x = _x().requires_grad_()
    (first,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert torch.isfinite(model.weight.grad).all() and model.weight.grad.abs().sum() > 0


# torch builds its table of forward-mode rules by torch.jit.script, and warns of itself
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_derivatives_are_torchs_own() -> None:
    model = Block().bfloat16()
    x = _x()
    _, want = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    products_context(model, torch.device("cpu"))
    _, found = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert torch.equal(found, want)
