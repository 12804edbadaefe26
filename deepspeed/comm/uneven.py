# SPDX-License-Identifier: Apache-2.0
"""An exchange of flat buffers in which each pair of ranks has as much for each other as it likes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from deepspeed.utils.errors import DeepSpeedCommError, explain

from .flat import _bytes, _copy_back, _host, _through_bytes
from .mesh import Axis
from .profiling import watched


@watched("all_to_all_single", "out")
def exchange_uneven(
    out: torch.Tensor,
    parts: torch.Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    axis: Axis,
) -> None:
    """Give each rank its part, and get this rank's parts from all; see `flat.exchange` for equal ones.

    Args:
        out: flat; afterwards the parts that the ranks had for this one, in the order of the axis.
        parts: flat, of the same dtype and device; a part for each rank, in the order of the axis.
        received, sent: elements of the parts, which the ranks must agree on.
        axis: who takes part.

    Raises:
        DeepSpeedCommError: the sizes or dtypes do not fit.
    """
    sizes = (out.numel(), parts.numel())
    if sizes != (sum(received), sum(sent)) or out.dtype != parts.dtype:
        raise DeepSpeedCommError(
            explain(
                "exchange_uneven: the buffers do not fit",
                got=f"{sizes[0]} x {out.dtype} for {sizes[1]} x {parts.dtype}",
                expected=f"{sum(received)} and {sum(sent)} elements of one dtype",
            )
        )
    if axis.size == 1:
        out.copy_(parts)
        return
    if not _through_bytes(axis, out):
        dist.all_to_all_single(out, parts, list(received), list(sent), group=axis.group)
        return
    width = out.element_size()
    source, target = _host(parts), _host(out, copy=False)
    dist.all_to_all_single(
        _bytes(target),
        _bytes(source),
        [count * width for count in received],
        [count * width for count in sent],
        group=axis.group,
    )
    _copy_back(out, target)()
