# SPDX-License-Identifier: Apache-2.0
"""Casts between floats of 32, 16 and 8 bits, and copies between many tensors and one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed.ops.abi import FORMATS
from deepspeed.ops.packing import CAST_CODES, is_plain, shared_numel, threads
from deepspeed.ops.registry import Op, Ulp, no_result
from deepspeed.utils.errors import explain

_CAST = FORMATS["ds_cast_args"]
_PIECES = FORMATS["ds_pieces_args"]


def _cast_reference(x: Tensor, out: Tensor) -> None:
    if out.dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-448, 448)  # older torch makes NaN of what is too large
    out.copy_(x.reshape(out.shape))


def _cast_pack(x: Tensor, out: Tensor) -> tuple[bytes, None] | None:
    numel = shared_numel("cast", x, out)
    codes = CAST_CODES.get(x.dtype), CAST_CODES.get(out.dtype)
    if numel < 0 or None in codes:
        return None
    return _CAST.pack(_CAST.size, threads(), numel, x.data_ptr(), out.data_ptr(), *codes), None


def _flatten_reference(out: Tensor, tensors: Sequence[Tensor]) -> None:
    _check_pieces(out, tensors)
    for part, tensor in zip(out.split([t.numel() for t in tensors]), tensors, strict=True):
        part.copy_(tensor.reshape(-1))


def _unflatten_reference(flat: Tensor, outs: Sequence[Tensor]) -> None:
    _check_pieces(flat, outs)
    for part, out in zip(flat.split([t.numel() for t in outs]), outs, strict=True):
        out.copy_(part.view(out.shape))


def _check_pieces(flat: Tensor, pieces: Sequence[Tensor]) -> None:
    numel = sum(piece.numel() for piece in pieces)
    if flat.dim() != 1 or flat.numel() != numel:
        raise ValueError(
            explain(
                "the flat buffer must be as long as its pieces together",
                got=f"shape {tuple(flat.shape)}",
                expected=f"({numel},)",
            )
        )


def _pack(
    flat: Tensor, pieces: Sequence[Tensor], scatter: bool
) -> tuple[bytes, None, Tensor] | None:
    _check_pieces(flat, pieces)
    if not is_plain(flat, *pieces) or any(t.dtype not in CAST_CODES for t in (flat, *pieces)):
        return None
    rows, begin = [], 0
    for piece in pieces:
        rows.append((piece.data_ptr(), begin, piece.numel(), CAST_CODES[piece.dtype]))
        begin += piece.numel()
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return (
        _PIECES.pack(
            _PIECES.size,
            threads(),
            len(rows),
            table.data_ptr(),
            flat.data_ptr(),
            flat.numel(),
            CAST_CODES[flat.dtype],
            scatter,
        ),
        None,
        table,
    )


def _flatten_pack(out: Tensor, tensors: Sequence[Tensor]) -> tuple[bytes, None, Tensor] | None:
    return _pack(out, tensors, False)


def _unflatten_pack(flat: Tensor, outs: Sequence[Tensor]) -> tuple[bytes, None, Tensor] | None:
    return _pack(flat, outs, True)


# As torch casts: to nearest even; what is too large becomes infinite, and 448 in e4m3, which has no infinity.
cast = Op(
    "cast(Tensor x, Tensor(a!) out) -> ()",
    reference=_cast_reference,
    fake=no_result,
    cpu="ds_cast",
    pack=_cast_pack,
    tolerance=Ulp(0),
)

flatten = Op(
    "flatten(Tensor(a!) out, Tensor[] tensors) -> ()",
    reference=_flatten_reference,
    fake=no_result,
    cpu="ds_pieces",
    pack=_flatten_pack,
    tolerance=Ulp(0),
)

unflatten = Op(
    "unflatten(Tensor flat, Tensor(a!)[] outs) -> ()",
    reference=_unflatten_reference,
    fake=no_result,
    cpu="ds_pieces",
    pack=_unflatten_pack,
    tolerance=Ulp(0),
)
