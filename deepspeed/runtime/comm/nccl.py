# SPDX-License-Identifier: Apache-2.0
"""`NcclBackend`: the compressed mean under the name that callers know; any backend of torch.distributed serves it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from deepspeed.comm.mesh import Axis

from .compressed import compressed_mean_

__all__ = ["NcclBackend"]


class NcclBackend:
    """The ranks that average together.

    Args:
        mpu: its data-parallel ranks are taken; None takes all ranks.
    """

    def __init__(self, mpu: Any = None) -> None:
        group = dist.group.WORLD if mpu is None else mpu.get_data_parallel_group()
        self.axis = Axis.of_group(group)
        self.size, self.rank = self.axis.size, self.axis.rank

    def compressed_allreduce(
        self,
        buffer_m: torch.Tensor,
        worker_error: torch.Tensor,
        server_error: torch.Tensor,
        local_rank: int | None = None,
    ) -> torch.Tensor:
        """Replace a tensor by its mean over the ranks; see `compressed_mean_`. Returns it."""
        flat = buffer_m.reshape(-1)
        buffer_m.copy_(
            compressed_mean_(flat, worker_error, server_error, self.axis).view_as(buffer_m)
        )
        return buffer_m
