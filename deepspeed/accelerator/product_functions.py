# SPDX-License-Identifier: Apache-2.0
"""Products of low-precision CPU tensors computed in fp32: linear, matmul, convolution, attention, with their gradients.

Every function here takes and returns tensors of one storage dtype (bf16 or fp16; fp32 and fp64 work too, for tests),
multiplies copies in the working dtype, accumulates there, and rounds each result once. What a backward needs is saved
in the storage dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

try:  # torch >= 2.4
    torch.is_autocast_enabled("cpu")
    autocast_on: Callable[[], bool] = functools.partial(torch.is_autocast_enabled, "cpu")
except TypeError:  # 2.3 takes no device
    autocast_on = torch.is_autocast_cpu_enabled

# [Note: blocks]
# A temporary of tens of MB is fresh memory each time it is made: the page faults of a 50 MB weight copy cost as much
# as its product (LM head of 50265 x 256 and 64 rows: 45 ms in one piece, 18 ms in blocks; fp32 itself 23 ms or more).
# So large products run over blocks of the weight's rows whose copies stay in the cache. Blocks of 64 k to 1 M elements
# did alike; the larger ones keep gemm itself fast when there are many rows of input.
_BLOCK = 1 << 20
_MIN_ROWS = 256

# [Note: worth]
# Below these sizes (multiplications; rows of a product that no backward follows) torch's naive loop is done before a
# Python function is: 10 us a call, 30 more for its backward. With few rows, as in generation, copying the weight costs
# more than reading it once. Measured on one AVX2 core; anything near the line is a draw.
_WORTH_RECORDED = 1 << 16
_WORTH_ALONE = 1 << 18
ROWS_ALONE = 4

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def _wide(x: Tensor) -> Tensor:
    """Copy to the working dtype, fp32 (fp64 stays as it is)."""
    return x if x.dtype is torch.float64 else x.float()


def _exact(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``compute`` out of reach of function modes, and of autocast, which would cast the fp32 copies back.

    Saved tensors are unpacked before: that may run a recomputation, which wants both.
    """

    @functools.wraps(compute)
    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            if not autocast_on():
                return compute(*args)
            with torch.autocast("cpu", enabled=False):
                return compute(*args)

    return run


def recorded(*tensors: Tensor | None) -> bool:
    """Say whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def worth(rows: int, work: int, recording: bool) -> bool:
    """Say whether a product pays for its copies and the call, see [Note: worth].

    Args:
        rows: of the left matrix, all batches together.
        work: multiplications.
        recording: whether a backward may follow.
    """
    if recording:
        return work >= _WORTH_RECORDED
    return work >= _WORTH_ALONE and rows >= ROWS_ALONE


# ------------------------------------------------------------------ linear: x [m, k], w [n, k], g [m, n]
def _rows(w: Tensor, m: int) -> int:
    """Rows of ``w`` a block takes, or all of them where one piece is small enough."""
    n, k = w.shape
    rows = max(_MIN_ROWS, _BLOCK // max(k, m, 1))
    return n if n <= 2 * rows else rows


def _wide_buffer(x: Tensor, rows: int) -> Tensor:
    return torch.empty_like(x[:rows], dtype=torch.promote_types(x.dtype, torch.float32))


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x @ w.T + bias -> [m, n] in x's dtype."""
    m, n, rows = x.shape[0], w.shape[0], _rows(w, x.shape[0])
    wide_x = _wide(x)
    if rows == n:
        if bias is None:
            return torch.mm(wide_x, _wide(w).t()).to(x.dtype)
        return torch.addmm(_wide(bias), wide_x, _wide(w).t()).to(x.dtype)
    out = x.new_empty(m, n)
    block, piece = _wide_buffer(w, rows), wide_x.new_empty(m, rows)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        end, wide_w, part = (
            first + count,
            block[:count].copy_(w[first : first + count]),
            piece[:, :count],
        )
        if bias is None:
            torch.mm(wide_x, wide_w.t(), out=part)
        else:
            torch.addmm(_wide(bias[first:end]), wide_x, wide_w.t(), out=part)
        out[:, first:end] = part
    return out


def _input_gradient(g: Tensor, w: Tensor) -> Tensor:
    """g @ w -> [m, k] in g's dtype; the sum over blocks stays in fp32."""
    n, rows = w.shape[0], _rows(w, g.shape[0])
    if (
        rows == n or torch.is_grad_enabled()
    ):  # recording for a second derivative: no writing in place
        return torch.mm(_wide(g), _wide(w)).to(g.dtype)
    block, piece = _wide_buffer(w, rows), None
    total: Tensor | None = None
    for first in range(0, n, rows):
        count = min(rows, n - first)
        wide_w = block[:count].copy_(w[first : first + count])
        if piece is None:
            piece = wide_w.new_empty(g.shape[0], rows)
        wide_g = piece[:, :count].copy_(g[:, first : first + count])
        total = torch.mm(wide_g, wide_w) if total is None else total.addmm_(wide_g, wide_w)
    return total.to(g.dtype)


def _weight_gradient(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """g.T @ x -> [n, k] in w's dtype and memory order."""
    n, rows = w.shape[0], _rows(w, g.shape[0])
    if rows == n or torch.is_grad_enabled():
        if w.stride(0) == 1 and w.stride(1) != 1:  # a transposed param: its gradient in its order
            return torch.mm(_wide(x).t(), _wide(g)).to(w.dtype).t()
        return torch.mm(_wide(g).t(), _wide(x)).to(w.dtype)
    out, wide_x = torch.empty_like(w), _wide(x)
    piece = wide_x.new_empty(g.shape[0], rows)
    block = wide_x.new_empty(rows, w.shape[1])
    for first in range(0, n, rows):
        count = min(rows, n - first)
        wide_g = piece[:, :count].copy_(g[:, first : first + count])
        out[first : first + count] = torch.mm(wide_g.t(), wide_x, out=block[:count])
    return out


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _Linear(Function):
    """x [*, k], w [n, k], bias [n] or None -> [*, n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _linear(x, w, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_gradients(g, *ctx.saved_tensors, ctx.needs_input_grad)


@_exact
def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return _product(_flat(x), w, bias).view(*x.shape[:-1], w.shape[0])


@_exact
def _linear_gradients(
    g: Tensor, x: Tensor, w: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    g = _flat(g)
    return (
        _input_gradient(g, w).view(x.shape) if needed[0] else None,
        _weight_gradient(g, _flat(x), w) if needed[1] else None,
        g.sum(0) if needed[2] else None,  # torch's own sum adds up in fp32
    )


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ w.T + bias``.

    Args:
        x: [*, k].
        w: [n, k], any strides.
        bias: [n] or None.

    Returns:
        [*, n] in x's dtype.
    """
    if recorded(x, w, bias):
        return _Linear.apply(x, w, bias)
    return _linear(x, w, bias)


# ------------------------------------------------------------------ batches of matrices
def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [*, m, k] @ b [*, k, n] in a's dtype; equal batches run in groups that stay in the cache."""
    size = a.shape[-2] * b.shape[-1] + a.shape[-2] * a.shape[-1] + b.shape[-2] * b.shape[-1]
    step = max(1, _BLOCK // max(size, 1))
    equal = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0]
    if not equal or a.shape[0] <= 2 * step or torch.is_grad_enabled():
        return torch.matmul(_wide(a), _wide(b)).to(a.dtype)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for first in range(0, a.shape[0], step):
        part = slice(first, first + step)
        out[part] = torch.bmm(_wide(a[part]), _wide(b[part]))
    return out


def _batch(x: Tensor, shape: torch.Size) -> Tensor:
    """Flatten the leading dims to one when that is a view and the batch needs no broadcast."""
    if x.dim() > 3 and x.shape[:-2] == shape:
        return x.flatten(0, -3)
    return x


def _batched(a: Tensor, b: Tensor) -> Tensor:
    shape = a.shape[:-2] if a.shape[:-2] == b.shape[:-2] else torch.Size()
    if len(shape) < 2:
        return _multiply(a, b)
    out = _multiply(_batch(a, shape), _batch(b, shape))
    return out.view(*shape, *out.shape[-2:])


class _Matmul(Function):
    """a [*, m, k], b [*, k, n], batches broadcast -> [*, m, n]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _matmul(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _matmul_gradients(g, *ctx.saved_tensors, ctx.needs_input_grad)


@_exact
def _matmul_gradients(
    g: Tensor, a: Tensor, b: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    return (
        _reduced(g, b.mT, a) if needed[0] else None,
        _reduced(a.mT, g, b) if needed[1] else None,
    )


def _reduced(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a @ b summed over the dims that ``like`` was broadcast along, rounded after the sum."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if batch == like.shape[:-2]:
        return _batched(a, b)
    return torch.matmul(_wide(a), _wide(b)).sum_to_size(like.shape).to(like.dtype)


_matmul = _exact(_batched)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.matmul(a, b)``, any number of dims from 1.

    Returns:
        torch.matmul's shape, in a's dtype.
    """
    if b.dim() == 1:
        return matmul(a, b.unsqueeze(-1)).squeeze(-1)
    if b.dim() == 2:
        return linear(a, b.t())
    if a.dim() == 1:
        return matmul(a.unsqueeze(0), b).squeeze(-2)
    if recorded(a, b):
        return _Matmul.apply(a, b)
    return _matmul(a, b)


# ------------------------------------------------------------------ convolution
class _Convolution(Function):
    """torch.convolution; ``how`` is its arguments after the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how, ctx.bias_sizes = how, None if bias is None else list(bias.shape)
        return _convolution(x, w, bias, how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:3])
        found = _convolution_gradients(g, *ctx.saved_tensors, ctx.bias_sizes, ctx.how, needed)
        return (*found, None)


@_exact
def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
    wide_bias = None if bias is None else _wide(bias)
    return torch.convolution(_wide(x), _wide(w), wide_bias, *how).to(x.dtype)


@_exact
def _convolution_gradients(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: list[int] | None,
    how: tuple[Any, ...],
    needed: list[bool],
) -> list[Tensor | None]:
    found = _convolution_backward(_wide(g), _wide(x), _wide(w), bias_sizes, *how, needed)
    return [d.to(x.dtype) if want else None for d, want in zip(found, needed, strict=True)]


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
    """Return ``torch.convolution(x, w, bias, *how)``.

    Args:
        x: [batch, channels, *space].
        w: the kernel, as torch.convolution takes it.
        bias: [channels out] or None.
        how: (stride, padding, dilation, transposed, output_padding, groups), lists of ints one for each space dim.
    """
    if recorded(x, w, bias):
        return _Convolution.apply(x, w, bias, how)
    return _convolution(x, w, bias, how)


# ------------------------------------------------------------------ attention without dropout
class _Attention(Function):
    """q, k, v [batch, heads, rows, head dim] -> q's shape, by torch's fused CPU attention in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        out, log_sum = _attention(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, out, log_sum, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable  # as torch's own fused attention
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        found = _attention_gradients(g, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return (*found, None, None, None)


@_exact
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    wide = (_wide(q), _wide(k), _wide(v))
    out, log_sum = _attend(*wide, 0.0, causal, attn_mask=_wide_mask(mask), scale=scale)
    return out.to(q.dtype), log_sum


@_exact
def _attention_gradients(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    *how: Any,
) -> list[Tensor]:
    causal, scale = how
    wide = [_wide(t) for t in (g, q, k, v, out)]
    found = _attend_backward(*wide, log_sum, 0.0, causal, attn_mask=_wide_mask(mask), scale=scale)
    return [d.to(q.dtype) for d in found]


def _wide_mask(mask: Tensor | None) -> Tensor | None:
    """The mask as the fused op adds it to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask if mask is None else _wide(mask)
    return torch.zeros(mask.shape, device="cpu").masked_fill_(mask.logical_not(), float("-inf"))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Return scaled dot product attention without dropout, fused.

    Args:
        q: [batch, heads, rows, head dim]; k and v alike, with their own rows.
        mask: boolean or additive, as torch's; must not require a gradient.
        causal: hide what comes later.
        scale: of the scores; None is 1 / sqrt(head dim).
    """
    if recorded(q, k, v):
        return _Attention.apply(q, k, v, mask, causal, scale)
    return _attention(q, k, v, mask, causal, scale)[0]
