# SPDX-License-Identifier: Apache-2.0
"""What every packer of native arguments shares: dtype codes, thread count, and the check of buffers.

Native code trusts its input, so everything it trusts is checked here.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from deepspeed.utils import env
from deepspeed.utils.errors import explain

# enum ds_dtype of csrc/api/ds_api.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# what the optimizer kernels take: fp64 params are for the reference
NARROW_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# what casts take
CAST_CODES = {**NARROW_CODES, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}

_forced_threads = env.DS_NUM_THREADS.get()


_of_this_thread = threading.local()


def limit_threads(most: int) -> None:
    """From now on native kernels that the calling thread starts use at most so many threads."""
    _of_this_thread.most = most


def threads() -> int:
    """Return how many threads a native kernel may use: DS_NUM_THREADS at import, else torch's count."""
    count = _forced_threads or torch.get_num_threads()
    return min(count, getattr(_of_this_thread, "most", count))


def shared_numel(op: str, first: Tensor, *others: Tensor | None) -> int:
    """Return the elements of buffers that can be walked side by side, or -1 where strides or addresses forbid it.

    Raises:
        ValueError: the tensors differ in size, or are not all in the CPU's memory.
    """
    numel = first.numel()
    contiguous = first.is_contiguous()
    aligned = is_aligned(first)
    for other in others:
        if other is None:
            continue
        aligned = aligned and is_aligned(other)
        if other.numel() != numel or not other.is_cpu:
            raise ValueError(
                explain(
                    f"{op}: the tensors of one call must match",
                    got=f"{tuple(other.shape)} on {other.device}",
                    expected=f"{numel} elements on {first.device}",
                )
            )
        contiguous = contiguous and other.is_contiguous()
    if not aligned:
        return -1
    if contiguous:
        return numel
    # Other orders of one dense block (channels last) serve as well, if all tensors have the same.
    strides = first.stride()
    same = all(other is None or other.stride() == strides for other in others)
    return numel if same and _is_dense(first) else -1


def narrow_codes(
    param: Tensor, state: Tensor, grad: Tensor, low: Tensor | None
) -> tuple[int, int, int, int] | None:
    """Return the dtype codes of an optimizer's four buffers, or None where the kernels lack one."""
    try:
        return (
            NARROW_CODES[param.dtype],
            NARROW_CODES[state.dtype],
            NARROW_CODES[grad.dtype],
            0 if low is None else NARROW_CODES[low.dtype],
        )
    except KeyError:
        return None


def check_real(op: str, values: Tensor) -> None:
    """Refuse values that are no real floating point numbers.

    Raises:
        ValueError: naming the dtype.
    """
    if not values.is_floating_point():
        raise ValueError(
            explain(f"{op}: these values are not rounded", got=values.dtype, expected="a float")
        )


def check_bytes(op: str, codes: Tensor) -> None:
    """Refuse codes that are no bytes.

    Raises:
        ValueError: naming the dtype.
    """
    if codes.dtype not in (torch.uint8, torch.int8):
        raise ValueError(
            explain(f"{op}: these are no codes", got=codes.dtype, expected="int8 or uint8")
        )


def is_aligned(tensor: Tensor) -> bool:
    """Say whether the elements start at multiples of their size, which memory that was given to torch need not do."""
    return tensor.data_ptr() % tensor.element_size() == 0


def is_plain(*tensors: Tensor) -> bool:
    """Say whether native code can walk each tensor: contiguous, aligned and in the CPU's memory."""
    return all(t.is_contiguous() and t.is_cpu and is_aligned(t) for t in tensors)


def _is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill one block of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
