# SPDX-License-Identifier: Apache-2.0
"""The LAMB rule as an op: one step of one whole tensor, whose norm scales the step."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.ops.abi import FORMATS
from deepspeed.ops.packing import narrow_codes, shared_numel, threads
from deepspeed.ops.registry import Op, Ulp

_LAMB = FORMATS["ds_lamb_args"]


def _reference(
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
    eps_inside: bool,
    bias_correction: bool,
    least: float,
    most: float,
    grad_scale: float | Tensor,
) -> Tensor:
    g = grad.float() * grad_scale
    exp_avg.copy_(exp_avg.float().lerp_(g, 1 - beta1))
    exp_avg_sq.copy_(exp_avg_sq.float().mul_(beta2).addcmul_(g, g, value=1 - beta2))
    # The moments as they are stored: a kernel that walks memory twice sees nothing else.
    p, m, v = param.float(), exp_avg.float(), exp_avg_sq.float()
    spread = (v + eps).sqrt_() if eps_inside else v.sqrt().add_(eps)
    update = (m / spread).add_(p, alpha=decay)
    size = lr
    if bias_correction:
        size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    ours, its = p.norm(), update.norm()
    ratio = (ours / its).clamp(least, most)
    ratio = torch.where((ours > 0) & (its > 0), ratio, torch.ones_like(ratio))
    p = p.sub(update.mul_(ratio * size))
    param.copy_(p)
    if low is not None and low.numel():
        low.copy_(p)
    return ratio.reshape(1)


def _fake(param: Tensor, *others: object) -> Tensor:
    return param.new_empty(1, dtype=torch.float32)


def _pack(
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
    eps_inside: bool,
    bias_correction: bool,
    least: float,
    most: float,
    grad_scale: float,
) -> tuple[bytes, Tensor] | None:
    if low is not None and low.numel() == 0:
        low = None
    numel = shared_numel("lamb_step", param, exp_avg, exp_avg_sq, grad, low)
    codes = narrow_codes(param, exp_avg, grad, low)
    if numel < 0 or codes is None or exp_avg_sq.dtype is not exp_avg.dtype:
        return None
    ratio = torch.empty(1, device="cpu")
    return _LAMB.pack(
        _LAMB.size,
        threads(),
        numel,
        param.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        grad.data_ptr(),
        0 if low is None else low.data_ptr(),
        ratio.data_ptr(),
        *codes,
        eps_inside,
        bias_correction,
        step,
        lr,
        beta1,
        beta2,
        eps,
        decay,
        least,
        most,
        grad_scale,
    ), ratio


lamb_step = Op(
    "lamb_step(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, "
    "Tensor(d!)? low, float lr, float beta1, float beta2, float eps, float decay, int step, "
    "bool eps_inside, bool bias_correction, float least, float most, float grad_scale) -> Tensor",
    reference=_reference,
    fake=_fake,
    cpu="ds_lamb_step",
    pack=_pack,
    # the norms are sums in fp32 in the reference, in double in the kernel
    tolerance=Ulp(16),
)
