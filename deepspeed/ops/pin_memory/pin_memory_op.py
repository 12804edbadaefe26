# SPDX-License-Identifier: Apache-2.0
"""What ``PinMemoryBuilder().load()`` returns: page-locked buffers, known to the handles of file I/O as well."""

from __future__ import annotations

from torch import Tensor

from deepspeed.ops.aio import buffers


class pin_handle:
    """Makes page-locked buffers and frees them; all handles of a process know the buffers of all."""

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """Return a 1-D CPU tensor of the example's dtype, page-locked as far as the system allows."""
        return buffers.locked_tensor(num_elem, example_tensor.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Let go of a buffer; returns whether it was one. Its memory goes with the last tensor that shares it."""
        return buffers.unlock(tensor)

    def free_cpu_locked_tensor_by_ptr(self, address: int) -> bool:
        """Let go of the buffer at an address; returns whether there is one."""
        return buffers.unlock_address(address)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Say whether a tensor's memory is page-locked."""
        return buffers.is_locked(tensor)
