# SPDX-License-Identifier: Apache-2.0
"""A mean over ranks that travels as one bit an element, and makes up next time for what that lost.

Both ways are compressed (1-bit Adam, arXiv:2102.02888): each rank sends the signs of its values and their root mean square;
each rank averages its share of the elements, and sends signs and root mean square of that. What compression took away is
kept, on either side, and added before the next one. Any backend serves: what travels are bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis

_BITS = 8


def error_sizes(numel: int, ranks: int) -> tuple[int, int]:
    """Elements of the two errors of `compressed_mean_` for values of `numel` elements."""
    grain = _BITS * ranks
    padded = -(-numel // grain) * grain
    return padded, padded // ranks


@torch.no_grad()
def compressed_mean_(
    values: Tensor, worker_error: Tensor, server_error: Tensor, axis: Axis
) -> Tensor:
    """Replace `values` by (an approximation of) their mean over the ranks; a collective of them.

    Args:
        values: flat, fp32 or float64, as large on all ranks.
        worker_error: what earlier calls lost of this rank's values; `error_sizes()[0]` elements, zeros at first.
        server_error: what they lost of this rank's share of the mean; `error_sizes()[1]` elements, zeros at first.
        axis: the ranks.

    Returns:
        `values`, equal on all ranks.
    """
    numel, share = values.numel(), server_error.numel()
    if numel == 0:
        return values
    whole = values + worker_error[:numel]
    scale, signs = _compressed(whole)
    torch.sub(whole, _expanded(scale, signs), out=worker_error[:numel])
    sent = _packed(torch.nn.functional.pad(signs, (0, share * axis.size - numel)))
    received = torch.empty_like(sent)
    flat.exchange(received, sent, axis)
    scales = _gathered(scale.reshape(1), axis)
    mean = server_error.clone()
    for part, part_scale in zip(received.chunk(axis.size), scales, strict=True):
        mean += _expanded(part_scale / axis.size, _unpacked(part))
    mine = max(0, min(share, numel - axis.rank * share))
    mean_scale, mean_signs = _compressed(mean[:mine])
    torch.sub(mean[:mine], _expanded(mean_scale, mean_signs), out=server_error[:mine])
    own = _packed(torch.nn.functional.pad(mean_signs, (0, share - mine)))
    all_signs = _unpacked(_gathered(own, axis)).view(axis.size, share)
    all_scales = _gathered(mean_scale.reshape(1), axis).view(-1, 1)
    values.copy_(_expanded(all_scales, all_signs).view(-1)[:numel])
    return values


def _compressed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square, and where values are not negative."""
    return values.norm() / max(1, values.numel()) ** 0.5, values >= 0


def _expanded(scale: Tensor, signs: Tensor) -> Tensor:
    return torch.where(signs, scale, -scale)


def _packed(signs: Tensor) -> Tensor:
    bits = signs.view(-1, _BITS).to(torch.uint8)
    return (bits << torch.arange(_BITS, dtype=torch.uint8, device=bits.device)).sum(
        1, dtype=torch.uint8
    )


def _unpacked(packed: Tensor) -> Tensor:
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).view(-1).bool()


def _gathered(own: Tensor, axis: Axis) -> Tensor:
    out = own.new_empty(axis.size * own.numel())
    flat.all_gather_into(out, own.contiguous(), axis)
    return out
