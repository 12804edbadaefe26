# SPDX-License-Identifier: Apache-2.0
"""For each op of the registry: arguments to call it with, and its maths again in float64, written independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# unit roundoff, and half the spacing of the subnormals
ROUNDOFF = {
    F32: (2.0**-24, 2.0**-150),
    BF16: (2.0**-8, 2.0**-134),
    F16: (2.0**-11, 2.0**-25),
    F64: (2.0**-53, 0.0),
}


class Expected(NamedTuple):
    """A result in float64, and the magnitude of the largest term that was added to make it."""

    value: torch.Tensor
    scale: torch.Tensor


class Case(NamedTuple):
    """How an op is tested: dtype mixes, arguments for one of them, which of these are written, the maths."""

    mixes: tuple[tuple[torch.dtype | None, ...], ...]
    make: Callable
    written: tuple[int, ...]
    maths: Callable


def _tensors(numel, dtypes, offset):
    """Return random tensors (None where the dtype is), each a view that starts `offset` elements late."""
    made = []
    for dtype in dtypes:
        if dtype is None:
            made.append(None)
            continue
        made.append(torch.randn(numel + offset).to(dtype)[offset:])
    return made


# param, state, grad, low
MIXES = (
    (F32, F32, F32, None),
    (F32, F32, BF16, BF16),
    (F32, F32, F16, F16),
    (BF16, BF16, BF16, None),
    (F16, F16, F16, None),
    (BF16, F32, BF16, F16),
    (F16, BF16, F32, F32),
)


def make_adam(numel, mix, offset=0, decoupled=True):
    p_type, s_type, g_type, low_type = mix
    param, m, v, grad, low = _tensors(numel, (p_type, s_type, s_type, g_type, low_type), offset)
    v.abs_()
    return [param, m, v, grad, low, 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, decoupled, True, 0.5]


def adam_maths(param, m, v, grad, low, lr, b1, b2, eps, decay, step, decoupled, correct, scale):
    p, m, v, g = (t.to(F64) for t in (param, m, v, grad))
    g = g * scale
    g_scale = g.abs()
    if decay and not decoupled:
        g_scale = g_scale + (decay * p).abs()
        g = g + decay * p
    kept = p * (1 - lr * decay) if decoupled else p
    new_m = b1 * m + (1 - b1) * g
    # m + (1 - b1) (g - m) adds terms as large as m
    m_scale = m.abs() + (1 - b1) * (g_scale + m.abs())
    new_v = b2 * v + (1 - b2) * g * g
    v_scale = b2 * v + (1 - b2) * g_scale**2
    c1, c2 = (1 - b1**step, 1 - b2**step) if correct else (1.0, 1.0)
    spread = (new_v / c2).sqrt() + eps
    new_p = kept - lr * (new_m / c1) / spread
    # an error of v moves the root by half of its relative size
    relative_v = v_scale / new_v.clamp_min(1e-300)
    p_scale = kept.abs() + lr / c1 * m_scale / spread * (1 + relative_v)
    results = [Expected(new_p, p_scale), Expected(new_m, m_scale), Expected(new_v, v_scale)]
    return results + ([Expected(new_p, p_scale)] if low is not None else [])


def make_adagrad(numel, mix, offset=0):
    p_type, s_type, g_type, low_type = mix
    param, v, grad, low = _tensors(numel, (p_type, s_type, g_type, low_type), offset)
    v.abs_()
    return [param, v, grad, low, 1e-2, 1e-10, 0.1, 0.5]


def adagrad_maths(param, v, grad, low, lr, eps, decay, scale):
    p, v, g = (t.to(F64) for t in (param, v, grad))
    g_scale = (g * scale).abs() + (decay * p).abs()
    g = g * scale + decay * p
    new_v, v_scale = v + g * g, v + g_scale**2
    spread = new_v.sqrt() + eps
    new_p = p - lr * g / spread
    p_scale = p.abs() + lr * g_scale / spread * (1 + v_scale / new_v.clamp_min(1e-300))
    results = [Expected(new_p, p_scale), Expected(new_v, v_scale)]
    return results + ([Expected(new_p, p_scale)] if low is not None else [])


def make_lion(numel, mix, offset=0):
    p_type, s_type, g_type, low_type = mix
    param, m, grad, low = _tensors(numel, (p_type, s_type, g_type, low_type), offset)
    # keep the direction away from 0, where its sign is a matter of rounding: m and g of one sign
    grad = torch.where(torch.signbit(m), -grad.abs(), grad.abs()).to(g_type)
    return [param, m, grad, low, 1e-2, 0.9, 0.99, 0.1, 0.5]


def lion_maths(param, m, grad, low, lr, b1, b2, decay, scale):
    p, m, g = (t.to(F64) for t in (param, m, grad))
    g = g * scale
    new_p = p * (1 - lr * decay) - lr * torch.sign(b1 * m + (1 - b1) * g)
    p_scale = p.abs() + lr
    new_m = b2 * m + (1 - b2) * g
    m_scale = m.abs() + (1 - b2) * (g.abs() + m.abs())
    results = [Expected(new_p, p_scale), Expected(new_m, m_scale)]
    return results + ([Expected(new_p, p_scale)] if low is not None else [])


def make_norm(numel, mix, offset=0):
    return _tensors(numel, mix, offset)


def norm_maths(x):
    # fsum adds without any rounding
    total = torch.tensor(math.fsum((x.to(F64) ** 2).tolist()), dtype=F64)
    return [Expected(total, total)]


def make_sgd(numel, mix, offset=0, nesterov=True, first=False):
    p_type, s_type, g_type, low_type = mix
    param, m, grad, low = _tensors(numel, (p_type, s_type, g_type, low_type), offset)
    dampening = 0.0 if nesterov else 0.2
    return [param, m, grad, low, 1e-2, 0.9, dampening, 0.1, nesterov, first, 0.5]


def sgd_maths(param, m, grad, low, lr, momentum, dampening, decay, nesterov, first, scale):
    p, m, g = (t.to(F64) for t in (param, m, grad))
    g_scale = (g * scale).abs() + (decay * p).abs()
    g = g * scale + decay * p
    new_m = g if first else momentum * m + (1 - dampening) * g
    m_scale = g_scale if first else (momentum * m).abs() + (1 - dampening) * g_scale
    move = g + momentum * new_m if nesterov else new_m
    new_p = p - lr * move
    p_scale = p.abs() + lr * (g_scale + m_scale)
    results = [Expected(new_p, p_scale), Expected(new_m, m_scale)]
    return results + ([Expected(new_p, p_scale)] if low is not None else [])


def make_lamb(numel, mix, offset=0, inside=False):
    p_type, s_type, g_type, low_type = mix
    param, m, v, grad, low = _tensors(numel, (p_type, s_type, s_type, g_type, low_type), offset)
    v.abs_()
    bounds = (0.01, 10.0)
    return [param, m, v, grad, low, 1e-2, 0.9, 0.99, 1e-3, 0.1, 3, inside, True, *bounds, 0.5]


def lamb_maths(
    param, m, v, grad, low, lr, b1, b2, eps, decay, step, inside, correct, least, most, scale
):
    p, m64, v64, g = (t.to(F64) for t in (param, m, v, grad))
    g = g * scale
    new_m, m_scale = b1 * m64 + (1 - b1) * g, m64.abs() + (1 - b1) * (g.abs() + m64.abs())
    new_v = b2 * v64 + (1 - b2) * g * g
    spread = (new_v + eps).sqrt() if inside else new_v.sqrt() + eps
    update = new_m / spread + decay * p
    ours, its = p.norm(), update.norm()
    ratio = (ours / its).clamp(least, most) if ours > 0 and its > 0 else torch.ones((), dtype=F64)
    size = lr * (1 - b2**step) ** 0.5 / (1 - b1**step) if correct else lr
    new_p = p - size * ratio * update
    # The update is made of the moments as stored: a rounding of theirs moves it by as much.
    half = ROUNDOFF[m.dtype][0] if m.dtype != F32 else 0.0
    update_scale = m_scale / spread + (decay * p).abs()
    moved = size * ratio * update_scale
    p_scale = p.abs() + 2 * moved + moved * (2 * half / (2 * ROUNDOFF[F32][0]))
    results = [Expected(new_p, p_scale), Expected(new_m, m_scale), Expected(new_v, new_v)]
    results += [Expected(new_p, p_scale)] if low is not None else []
    # all moments err alike at most; the norms err by no more
    return [*results, Expected(ratio.reshape(1), ratio.reshape(1) * (4 + half / ROUNDOFF[F32][0]))]


CASES = {
    "adam_step": Case(MIXES, make_adam, (0, 1, 2, 4), adam_maths),
    "adagrad_step": Case(MIXES, make_adagrad, (0, 1, 3), adagrad_maths),
    "lion_step": Case(MIXES, make_lion, (0, 1, 3), lion_maths),
    "sgd_step": Case(MIXES, make_sgd, (0, 1, 3), sgd_maths),
    "lamb_step": Case(MIXES, make_lamb, (0, 1, 2, 4), lamb_maths),
    "squared_norm": Case(((F32,), (BF16,), (F16,), (F64,)), make_norm, (), norm_maths),
}


def clone(args):
    """Copy the arguments, keeping each tensor's place in memory relative to its alignment."""
    return [
        torch.empty(a.numel() + 1, dtype=a.dtype)[-a.numel() :].copy_(a)
        if isinstance(a, torch.Tensor) and a.numel()
        else a.clone()
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]


def run(op, case, args):
    """Call the op on copies; return what it wrote, and its result if it has one."""
    copies = clone(args)
    result = op(*copies)
    written = [copies[i] for i in case.written if copies[i] is not None]
    return written + ([result] if result is not None else [])


def worst_excess(got, expected, ulps):
    """Return by what factor the worst element passes `ulps` of fp32 arithmetic and one rounding to its dtype."""
    if got.numel() == 0:
        return 0.0
    value, scale = expected
    half, floor = ROUNDOFF[got.dtype]
    work = ROUNDOFF[F64 if got.dtype == F64 else F32][0] * 2
    allowed = ulps * work * scale + half * value.abs() * 1.01 + floor
    if got.dtype in (F32, F64):
        allowed = ulps * work * scale + floor
    error = (got.to(F64) - value).abs()
    return float((error / allowed.clamp_min(1e-300)).max())
