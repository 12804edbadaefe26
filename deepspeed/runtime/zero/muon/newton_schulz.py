# SPDX-License-Identifier: Apache-2.0
"""Orthogonalising a matrix by products alone: five quintic Newton-Schulz steps towards U Vᵀ of its SVD.

A step maps each singular value s to a s + b s³ + c s⁵, with coefficients that lift small ones fast; after five steps all
lie between about 0.7 and 1.2, which is as good as 1 for a direction of descent.

[Note: Two ways of the same polynomial]
    "standard" keeps the n x m matrix X: each step multiplies it by P = a + b A + c A², A = X Xᵀ. "gram" keeps A alone, an
    n x n matrix (n <= m): as all P are polynomials of the first A they commute, so A becomes P A P, the product Q of all
    P is gathered, and X is touched twice, at the beginning and by Q X at the end. In exact arithmetic both give the same;
    gram does less work where m is well above n. In 16 bits A loses its small eigenvalues to rounding, so there X is
    brought up to date once on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

NS_METHODS = ("gram", "standard")
NS_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7
_REFRESH_AFTER = 2


def orthogonalize(matrix: Tensor, steps: int = NS_STEPS, method: str = "gram") -> Tensor:
    """The matrix with its singular values brought near 1.

    Args:
        matrix: [..., rows, columns], any float dtype; leading dimensions are a batch.
        steps: Newton-Schulz steps.
        method: "gram" or "standard"; see [Note: Two ways of the same polynomial].

    Returns:
        A tensor of the same shape, in the dtype of the arithmetic: fp32 on CPUs (float64 for float64), else fp16 for
        gram and bf16 for standard.

    Raises:
        ValueError: fewer than two dimensions, or another method.
    """
    if matrix.dim() < 2 or method not in NS_METHODS:
        raise ValueError(
            f"Newton-Schulz takes matrices and the methods {', '.join(NS_METHODS)}; "
            f"got shape {tuple(matrix.shape)} and {method!r}"
        )
    wide = torch.promote_types(matrix.dtype, torch.float32)
    x = matrix.to(wide)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPSILON)
    x = x.to(_arithmetic(matrix, method))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = _gram(x, steps) if method == "gram" else _standard(x, steps)
    return x.mT if tall else x


def _arithmetic(matrix: Tensor, method: str) -> torch.dtype:
    if matrix.dtype == torch.float64:
        return torch.float64
    if matrix.device.type == "cpu":
        return torch.float32
    return torch.float16 if method == "gram" else torch.bfloat16


def _standard(x: Tensor, steps: int) -> Tensor:
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _gram(x: Tensor, steps: int) -> Tensor:
    a, b, c = _COEFFICIENTS
    narrow = x.dtype.itemsize < 4
    gathered: Tensor | None = None
    gram = x @ x.mT
    for step in range(steps):
        rest = b * gram + c * (gram @ gram)  # P without its multiple of the identity
        if gathered is None:
            gathered = rest.clone()
            gathered.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            gathered = a * gathered + gathered @ rest
        if step + 1 == steps:
            break
        if narrow and step + 1 == _REFRESH_AFTER:
            x, gathered = gathered @ x, None
            gram = x @ x.mT
            continue
        half = a * gram + gram @ rest
        gram = a * half + rest @ half
    return x if gathered is None else gathered @ x
