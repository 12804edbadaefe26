# SPDX-License-Identifier: Apache-2.0
"""Sums of squares of large flat buffers, in double, without a copy of the buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.ops.abi import FORMATS
from deepspeed.ops.packing import DTYPE_CODES, shared_numel, threads
from deepspeed.ops.registry import Op, Ulp

_NORM = FORMATS["ds_norm_args"]
# Elements widened at a time by the reference: 32 MiB of doubles.
_CHUNK = 1 << 22


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares of all elements, a 0-dim float64 tensor on the device of `x`.

    Any float dtype and shape; no elements give 0. Inf and NaN in `x` come through as inf or nan, so the
    result also tells whether all elements are finite. The CPU kernel gives the same bits for any number
    of threads and any instruction set.
    """
    return _squared_norm(x.detach())


def _reference(x: Tensor) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for chunk in x.reshape(-1).split(_CHUNK):
        total += chunk.to(torch.float64, copy=True).square_().sum()
    return total


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


def _pack(x: Tensor) -> tuple[bytes, Tensor] | None:
    numel = shared_numel("squared_norm", x)
    code = DTYPE_CODES.get(x.dtype)
    if numel < 0 or code is None:
        return None
    out = torch.empty((), dtype=torch.float64, device="cpu")
    return _NORM.pack(_NORM.size, threads(), numel, x.data_ptr(), out.data_ptr(), code, 0), out


_squared_norm = Op(
    "squared_norm(Tensor x) -> Tensor",
    reference=_reference,
    fake=_fake,
    cpu="ds_squared_norm",
    cuda="deepspeed.ops.cuda_optim:squared_norm",
    pack=_pack,
    # Double sums of up to millions of terms in another order than torch's.
    tolerance=Ulp(64),
)
