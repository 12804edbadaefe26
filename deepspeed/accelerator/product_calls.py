# SPDX-License-Identifier: Apache-2.0
"""Which torch calls are products, and how each is sent through fp32 (product_functions)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import product_functions as through

LOW = (torch.bfloat16, torch.float16)
Dtypes = frozenset[torch.dtype]

# ------------------------------------------------------------------ which calls are ours
if hasattr(torch, "get_autocast_dtype"):
    _autocast_dtype: Callable[[], torch.dtype] = functools.partial(torch.get_autocast_dtype, "cpu")
else:  # torch 2.3
    _autocast_dtype = torch.get_autocast_cpu_dtype


def transformed() -> bool:
    """Say whether a functional transform, forward-mode AD or a tracer looks on: theirs are torch's own products."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _common(tensors: Iterable[Any]) -> torch.dtype | None:
    """Return the dtype that plain strided CPU tensors share, or None where they are not all such."""
    dtype = None
    for x in tensors:
        if x is None:
            continue
        kind = type(x)
        if (kind is not Tensor and kind is not nn.Parameter) or not x.is_cpu:
            return None
        if x.layout is not torch.strided or (dtype is not None and x.dtype is not dtype):
            return None
        dtype = x.dtype
    return dtype


def _low(dtypes: Dtypes, *tensors: Tensor | None) -> list[Any] | None:
    """Return the tensors as they are to be multiplied, or None where the call is not ours.

    With autocast on they are cast as it would.
    """
    if through.autocast_on():
        dtype = _autocast_dtype()
        if dtype not in dtypes:
            return None
        tensors = tuple(t.to(dtype) if t is not None and _castable(t) else t for t in tensors)
    return list(tensors) if _common(tensors) in dtypes else None


def _castable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cpu and x.dtype in (torch.float32, *LOW)


# ------------------------------------------------------------------ handlers: (dtypes, func, args, kwargs) -> result
Handler = Callable[[Dtypes, Any, tuple[Any, ...], dict[str, Any]], Any]


def _linear(dtypes: Dtypes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        found = _low(dtypes, input, weight, bias)
        if found is None or weight.dim() != 2 or input.dim() == 0:
            return func(*args, **kwargs)
        if (bias is not None and bias.dim() != 1) or not _worth(found[0], found[1].t()):
            return func(*args, **kwargs)
        return through.linear(*found)

    return call(*args, **kwargs)


def _matmul(dtypes: Dtypes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 2:
        return _widen(dtypes, func, args, kwargs)
    found = _low(dtypes, *args)
    if found is None or not _multiplies(func, *found):
        return func(*args)
    if func is Tensor.__rmatmul__:
        found.reverse()
    return through.matmul(*found) if _worth(*found) else func(*args)


def _worth(a: Tensor, b: Tensor) -> bool:
    rows = a.numel() // max(a.shape[-1], 1)
    batch = b.numel() // max(b.shape[-1] * b.shape[-2], 1) if b.dim() > 2 and a.dim() < 3 else 1
    work = a.numel() * batch * (b.shape[-1] if b.dim() > 1 else 1)
    return through.worth(rows, work, through.recorded(a, b))


def _multiplies(func: Any, a: Tensor, b: Tensor) -> bool:
    """Say whether ``func`` takes these dims (where not, torch words the error)."""
    dims = _DIMS.get(func)
    return min(a.dim(), b.dim()) > 0 if dims is None else a.dim() == b.dim() == dims


def _addmm(dtypes: Dtypes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 3 and not kwargs and args[0].dim() == 1:
        found = _low(dtypes, *args)
        fits = args[1].dim() == args[2].dim() == 2 and args[0].shape[0] == args[2].shape[-1]
        if found is not None and fits:
            return through.linear(found[1], found[2].t(), found[0])
    return _widen(dtypes, func, args, kwargs)


def _conv(dtypes: Dtypes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    space, transposed = _CONVOLUTIONS[func]

    def spread(value: Any) -> list[int]:
        return [value] * space if isinstance(value, int) else list(value) * (space // len(value))

    def call(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        *rest: Any,
        **more: Any,
    ) -> Any:
        padding, *others = rest or (more.pop("padding", 0),)
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        how = {
            "output_padding": 0,
            "groups": 1,
            "dilation": 1,
            **dict(zip(names, others, strict=False)),
            **more,
        }
        found = _low(dtypes, input, weight, bias)
        if found is None or isinstance(padding, str) or input.dim() != space + 2:
            return _widen(dtypes, func, args, kwargs)
        sizes = [spread(v) for v in (stride, padding, how["dilation"], how["output_padding"])]
        x, w, b = found
        return through.convolution(x, w, b, (*sizes[:3], transposed, sizes[3], how["groups"]))

    return call(*args, **kwargs)


def _attention(dtypes: Dtypes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        found = None if enable_gqa or dropout_p else _low(dtypes, query, key, value)
        if found is None or (attn_mask is not None and attn_mask.requires_grad):
            return _widen(dtypes, func, args, kwargs)
        q, k, v = found
        if torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal, scale=scale) != _FUSED:
            return _widen(dtypes, func, args, kwargs)
        # torch's forward is slow in fp16 only, and copies of keys and values want a few rows to pay
        few = query.dtype is torch.bfloat16 or query.shape[-2] < through.ROWS_ALONE
        if few and not through.recorded(q, k, v):
            return func(*args, **kwargs)
        return through.attention(q, k, v, attn_mask, is_causal, scale)

    return call(*args, **kwargs)


def _widen(dtypes: Dtypes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The general way: the whole call on fp32 copies, its results rounded. Autograd keeps the copies."""
    low: list[torch.dtype] = []

    def up(x: Any) -> Any:
        if isinstance(x, Tensor):
            if _common((x,)) in dtypes:
                low.append(x.dtype)
                return x.float()
            if not _common((x,)):
                low.append(torch.uint8)  # not plain: leave the call alone
            return x
        if isinstance(x, (list, tuple)) and type(x) in (list, tuple):
            return type(x)(map(up, x))
        return x

    wide, wide_kwargs = up(args), {name: up(value) for name, value in kwargs.items()}
    casting = through.autocast_on()
    if casting:
        low = [_autocast_dtype()] if torch.uint8 not in low else []
    if len(set(low)) != 1 or low[0] not in dtypes or "out" in kwargs:
        return func(*args, **kwargs)

    def down(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(low[0]) if x.dtype is torch.float32 else x
        return type(x)(map(down, x)) if type(x) in (list, tuple) else x

    with torch.autocast("cpu", enabled=False) if casting else contextlib.nullcontext():
        return down(func(*wide, **wide_kwargs))


_FUSED = int(torch._C._SDPBackend.FLASH_ATTENTION)
_CONVOLUTIONS = {
    torch.conv1d: (1, False),
    torch.conv2d: (2, False),
    torch.conv3d: (3, False),
    torch.conv_transpose1d: (1, True),
    torch.conv_transpose2d: (2, True),
    torch.conv_transpose3d: (3, True),
}
_DIMS = {torch.mm: 2, Tensor.mm: 2, torch.bmm: 3, Tensor.bmm: 3}
_MATMULS = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.linalg.matmul,
    *_DIMS,
)
_GENERAL = (
    torch.baddbmm,
    Tensor.baddbmm,
    torch.addbmm,
    Tensor.addbmm,
    torch.einsum,
    torch.tensordot,
    torch.inner,
    torch.chain_matmul,
    torch.linalg.multi_dot,
    torch.bilinear,
    torch.conv_tbc,
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    F.multi_head_attention_forward,
)
HANDLERS: dict[Any, Handler] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(_CONVOLUTIONS, _conv),
    **dict.fromkeys(_GENERAL, _widen),
}
