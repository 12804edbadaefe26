# SPDX-License-Identifier: Apache-2.0
"""A thread that steps beside the training: native kernels hold no lock of the interpreter while they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from deepspeed.ops.packing import limit_threads


def split_cores(available: Sequence[int], reserved: float) -> tuple[list[int], list[int]]:
    """Divide cores between the host's step and the training.

    Args:
        available: the cores.
        reserved: share that the training keeps, rounded up.

    Returns:
        The cores of the step, and those of the training; all of them twice where one side would get none.
    """
    count = math.ceil(reserved * len(available))
    if not 0 < count < len(available):
        return list(available), list(available)
    return list(available[count:]), list(available[:count])


class HostWorker:
    """One thread, and what it was given to do, in order.

    Args:
        most_threads: of native kernels that it starts.
    """

    def __init__(self, most_threads: int) -> None:
        self.most_threads = max(1, most_threads)
        self._pool = ThreadPoolExecutor(
            1, "deepspeed-host-step", limit_threads, (self.most_threads,)
        )

    def start(self, job: Callable[..., Any], *given: Any) -> Future[Any]:
        """Run `job` after what was started before; the result, or its error, is in what is returned."""
        return self._pool.submit(torch.no_grad()(job), *given)

    def close(self) -> None:
        """Wait for what was started, and end the thread."""
        self._pool.shutdown(wait=True)
