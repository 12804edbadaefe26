# SPDX-License-Identifier: Apache-2.0
"""The elementwise optimizer rules as ops: Adam, Adagrad, Lion and SGD on one tensor, reference and native.

Each reference is the definition of correct. The arithmetic is fp32 (fp64 for fp64 params), whatever the
buffers hold: a 16-bit buffer is widened first and rounded once, when it is written back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeed.ops import random_bits
from deepspeed.ops.abi import FORMATS
from deepspeed.ops.packing import narrow_codes, shared_numel, threads
from deepspeed.ops.registry import Op, Ulp, no_result
from deepspeed.utils.errors import explain

_ADAM = FORMATS["ds_adam_args"]
_ADAGRAD = FORMATS["ds_adagrad_args"]
_LION = FORMATS["ds_lion_args"]
_SGD = FORMATS["ds_sgd_args"]


def _work(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor itself when it has the dtype of the arithmetic, else a widened copy."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _arithmetic(param: Tensor) -> torch.dtype:
    if not param.dtype.is_floating_point:
        raise TypeError(
            explain(
                "only floating params can be stepped", got=param.dtype, expected="fp32, bf16, …"
            )
        )
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _gradient(grad: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    work = _work(grad, dtype)
    return work if scale == 1.0 else work * scale


def _write_back(pairs: tuple[tuple[Tensor, Tensor], ...], low: Tensor | None) -> None:
    for target, work in pairs:
        if target is not work:
            target.copy_(work)
    if low is not None:
        low.copy_(pairs[0][1])


def _adam_reference(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    grad_scale: float,
) -> None:
    dtype = _arithmetic(param)
    p, m, v = (_work(t, dtype) for t in (param, exp_avg, exp_avg_sq))
    g = _gradient(grad, dtype, grad_scale)
    _adam(p, m, v, g, (lr, beta1, beta2, eps, decay), step, decoupled, bias_correction)
    _write_back(((param, p), (exp_avg, m), (exp_avg_sq, v)), low)


def _adam(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    rates: tuple[float, float, float, float, float],
    step: int,
    decoupled: bool,
    bias_correction: bool,
) -> None:
    """The rule itself, in place on buffers of the arithmetic's dtype."""
    lr, beta1, beta2, eps, decay = rates
    # The order of operations is torch.optim's (single tensor), so that fp32 agrees with it bit for bit.
    if decay != 0:
        if decoupled:
            p.mul_(1 - lr * decay)
        else:
            g = g.add(p, alpha=decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    bias1 = 1 - beta1**step if bias_correction else 1.0
    bias2 = 1 - beta2**step if bias_correction else 1.0
    p.addcdiv_(m, (v.sqrt() / bias2**0.5).add_(eps), value=-(lr / bias1))


def _random_adam_reference(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    grad_scale: float,
    seed: int,
) -> None:
    _check_random(param, exp_avg)
    p, m, v = (_work(t, torch.float32) for t in (param, exp_avg, exp_avg_sq))
    g = _gradient(grad, torch.float32, grad_scale)
    _adam(p, m, v, g, (lr, beta1, beta2, eps, decay), step, decoupled, bias_correction)
    low, high = (bits.reshape(param.shape) for bits in random_bits.noise(seed, p.numel(), p.device))
    param.copy_(random_bits.to_bf16(p, low))
    if exp_avg.dtype == torch.bfloat16:
        exp_avg.copy_(random_bits.to_bf16(m, low >> 16))
        exp_avg_sq.copy_(random_bits.to_bf16(v, high))


def _check_random(param: Tensor, state: Tensor) -> None:
    if param.dtype != torch.bfloat16 or state.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            explain(
                "stochastic rounding is for bf16 params",
                got=f"{param.dtype} with moments of {state.dtype}",
                expected="torch.bfloat16 with moments of torch.bfloat16 or torch.float32",
            )
        )


def adam_rollback(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    grad_scale: float,
) -> None:
    """Take back one `adam_step` made with the same arguments, to within rounding. Computed in fp64."""
    p, m, v = (t.to(torch.float64, copy=True) for t in (param, exp_avg, exp_avg_sq))
    g = grad.to(torch.float64, copy=True).mul_(grad_scale)
    bias1 = 1 - beta1**step if bias_correction else 1.0
    bias2 = 1 - beta2**step if bias_correction else 1.0
    moved = (m / bias1).mul_(lr).div_((v / bias2).sqrt_().add_(eps))
    p.add_(moved)
    if decay != 0:
        if decoupled:
            p.div_(1 - lr * decay)
        else:
            g.add_(p, alpha=decay)
    m.sub_(g, alpha=1 - beta1).div_(beta1)
    v.addcmul_(g, g, value=beta2 - 1).div_(beta2).clamp_(min=0)
    _write_back(((param, p), (exp_avg, m), (exp_avg_sq, v)), low)


def _adagrad_reference(
    param: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    eps: float,
    decay: float,
    grad_scale: float,
) -> None:
    dtype = _arithmetic(param)
    p, v = _work(param, dtype), _work(exp_avg_sq, dtype)
    g = _gradient(grad, dtype, grad_scale)
    if decay != 0:
        g = g.add(p, alpha=decay)
    v.addcmul_(g, g)
    p.addcdiv_(g, v.sqrt().add_(eps), value=-lr)
    _write_back(((param, p), (exp_avg_sq, v)), low)


def _lion_reference(
    param: Tensor,
    exp_avg: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
    grad_scale: float,
) -> None:
    dtype = _arithmetic(param)
    p, m = _work(param, dtype), _work(exp_avg, dtype)
    g = _gradient(grad, dtype, grad_scale)
    if decay != 0:
        p.mul_(1 - lr * decay)
    direction = m.lerp(g, 1 - beta1).sign_()
    p.add_(direction, alpha=-lr)
    m.lerp_(g, 1 - beta2)
    _write_back(((param, p), (exp_avg, m)), low)


def _sgd_reference(
    param: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    decay: float,
    nesterov: bool,
    first: bool,
    grad_scale: float,
) -> None:
    dtype = _arithmetic(param)
    p = _work(param, dtype)
    g = _gradient(grad, dtype, grad_scale)
    if decay != 0:
        g = g.add(p, alpha=decay)
    pairs = [(param, p)]
    if momentum != 0:
        if momentum_buffer is None:
            raise ValueError(
                explain("SGD with momentum keeps a buffer", got="momentum_buffer=None")
            )
        m = _work(momentum_buffer, dtype)
        if first:
            m.copy_(g)
        else:
            m.mul_(momentum).add_(g, alpha=1 - dampening)
        g = g.add(m, alpha=momentum) if nesterov else m
        pairs.append((momentum_buffer, m))
    p.add_(g, alpha=-lr)
    _write_back(tuple(pairs), low)


def _pack_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    grad_scale: float,
    seed: int | None = None,
) -> tuple[bytes, None] | None:
    numel = shared_numel("adam_step", param, exp_avg, exp_avg_sq, grad, low)
    codes = narrow_codes(param, exp_avg, grad, low)
    if numel < 0 or codes is None or exp_avg_sq.dtype is not exp_avg.dtype:
        return None
    return _ADAM.pack(
        _ADAM.size,
        threads(),
        numel,
        param.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        grad.data_ptr(),
        0 if low is None else low.data_ptr(),
        *codes,
        decoupled,
        bias_correction,
        seed is not None,
        0,
        seed or 0,
        step,
        lr,
        beta1,
        beta2,
        eps,
        decay,
        grad_scale,
    ), None


def _pack_random_adam(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *rule: Any
) -> tuple[bytes, None] | None:
    _check_random(param, exp_avg)
    return _pack_adam(param, exp_avg, exp_avg_sq, grad, None, *rule)


def _pack_adagrad(
    param: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    eps: float,
    decay: float,
    grad_scale: float,
) -> tuple[bytes, None] | None:
    numel = shared_numel("adagrad_step", param, exp_avg_sq, grad, low)
    codes = narrow_codes(param, exp_avg_sq, grad, low)
    if numel < 0 or codes is None:
        return None
    return _ADAGRAD.pack(
        _ADAGRAD.size,
        threads(),
        numel,
        param.data_ptr(),
        exp_avg_sq.data_ptr(),
        grad.data_ptr(),
        0 if low is None else low.data_ptr(),
        *codes,
        lr,
        eps,
        decay,
        grad_scale,
    ), None


def _pack_lion(
    param: Tensor,
    exp_avg: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
    grad_scale: float,
) -> tuple[bytes, None] | None:
    numel = shared_numel("lion_step", param, exp_avg, grad, low)
    codes = narrow_codes(param, exp_avg, grad, low)
    if numel < 0 or codes is None:
        return None
    return _LION.pack(
        _LION.size,
        threads(),
        numel,
        param.data_ptr(),
        exp_avg.data_ptr(),
        grad.data_ptr(),
        0 if low is None else low.data_ptr(),
        *codes,
        lr,
        beta1,
        beta2,
        decay,
        grad_scale,
    ), None


def _pack_sgd(
    param: Tensor,
    momentum_buffer: Tensor | None,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    decay: float,
    nesterov: bool,
    first: bool,
    grad_scale: float,
) -> tuple[bytes, None] | None:
    if momentum == 0:
        momentum_buffer = None
    elif momentum_buffer is None:
        return None  # the reference says what is wrong
    numel = shared_numel("sgd_step", param, momentum_buffer, grad, low)
    codes = narrow_codes(param, param if momentum_buffer is None else momentum_buffer, grad, low)
    if numel < 0 or codes is None:
        return None
    return _SGD.pack(
        _SGD.size,
        threads(),
        numel,
        param.data_ptr(),
        0 if momentum_buffer is None else momentum_buffer.data_ptr(),
        grad.data_ptr(),
        0 if low is None else low.data_ptr(),
        *codes,
        nesterov,
        first,
        lr,
        momentum,
        dampening,
        decay,
        grad_scale,
    ), None


adam_step = Op(
    "adam_step(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, "
    "Tensor(d!)? low, float lr, float beta1, float beta2, float eps, float decay, int step, "
    "bool decoupled, bool bias_correction, float grad_scale) -> ()",
    reference=_adam_reference,
    fake=no_result,
    cpu="ds_adam_step",
    cuda="deepspeed.ops.cuda_optim:adam_step",
    pack=_pack_adam,
    tolerance=Ulp(4),
)

adagrad_step = Op(
    "adagrad_step(Tensor(a!) param, Tensor(b!) exp_avg_sq, Tensor grad, Tensor(c!)? low, "
    "float lr, float eps, float decay, float grad_scale) -> ()",
    reference=_adagrad_reference,
    fake=no_result,
    cpu="ds_adagrad_step",
    cuda="deepspeed.ops.cuda_optim:adagrad_step",
    pack=_pack_adagrad,
    tolerance=Ulp(4),
)

lion_step = Op(
    "lion_step(Tensor(a!) param, Tensor(b!) exp_avg, Tensor grad, Tensor(c!)? low, float lr, "
    "float beta1, float beta2, float decay, float grad_scale) -> ()",
    reference=_lion_reference,
    fake=no_result,
    cpu="ds_lion_step",
    cuda="deepspeed.ops.cuda_optim:lion_step",
    pack=_pack_lion,
    tolerance=Ulp(4),
)

sgd_step = Op(
    "sgd_step(Tensor(a!) param, Tensor(b!)? momentum_buffer, Tensor grad, Tensor(c!)? low, float lr, "
    "float momentum, float dampening, float decay, bool nesterov, bool first, float grad_scale) -> ()",
    reference=_sgd_reference,
    fake=no_result,
    cpu="ds_sgd_step",
    pack=_pack_sgd,
    tolerance=Ulp(4),
)

# bf16 params without a master copy; see `random_bits` for the numbers that a seed stands for.
random_adam_step = Op(
    "random_adam_step(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, "
    "float lr, float beta1, float beta2, float eps, float decay, int step, "
    "bool decoupled, bool bias_correction, float grad_scale, int seed) -> ()",
    reference=_random_adam_reference,
    fake=no_result,
    cpu="ds_adam_step",
    pack=_pack_random_adam,
    tolerance=Ulp(4),
)
