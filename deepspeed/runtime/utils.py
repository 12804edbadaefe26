# SPDX-License-Identifier: Apache-2.0
"""What training loops share: norms and clipping, memory lines, seeds, partitions, small conveniences."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import psutil
import torch

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_group,
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
)
from deepspeed.utils.errors import explain
from deepspeed.utils.torch import required_torch_version as required_torch_version

PIPE_REPLICATED = "ds_pipe_replicated"
_GB = 1024**3

noop_context = contextlib.nullcontext


class DummyOptim:
    """Stands where an optimizer is expected and only holds its param groups.

    Args:
        params: params of one group, an iterable.
    """

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        self.param_groups = [{"params": params}]


def noop_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function itself."""
    return func


def ensure_directory_exists(filename: str | os.PathLike[str]) -> None:
    """Make the folder that ``filename`` is to be written to."""
    folder = os.path.dirname(os.fspath(filename))
    if folder:
        os.makedirs(folder, exist_ok=True)


def set_random_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (the devices' included)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """Return the text of a call: ``call_to_str("f", 1, a=2)`` is ``"f(1, a=2)"``."""
    parts = [repr(arg) for arg in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"{base}({', '.join(parts)})"


def get_only_unique_item(items: Iterable[Any]) -> Any:
    """Return the value that all items share.

    Raises:
        RuntimeError: they differ, or there are none.
    """
    distinct = set(items)
    if len(distinct) != 1:
        raise RuntimeError(explain("expected one value", got=repr(distinct)))
    return distinct.pop()


# ------------------------------------------------------------------ moving values
def copy_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool]) -> Any:
    """Return ``item`` with copies on ``device`` of what ``criterion_func`` accepts, containers kept."""
    return _walk(item, criterion_func, lambda value: value.detach().clone().to(device))


def move_to_device(
    item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None
) -> Any:
    """Return ``item`` with what ``criterion_func`` accepts moved to ``device``, containers kept.

    Args:
        item: a tensor, or nested lists, tuples and dicts of tensors and other values.
        device: where to.
        criterion_func: what to move; None moves every tensor.
    """
    accept = criterion_func or (lambda value: isinstance(value, torch.Tensor))
    return _walk(item, accept, lambda value: value.to(device))


def _walk(item: Any, accept: Callable[[Any], bool], act: Callable[[Any], Any]) -> Any:
    if accept(item):
        return act(item)
    if isinstance(item, tuple) and hasattr(item, "_fields"):  # a named tuple
        return type(item)(*(_walk(value, accept, act) for value in item))
    if isinstance(item, list | tuple):
        return type(item)(_walk(value, accept, act) for value in item)
    if isinstance(item, Mapping):
        return {key: _walk(value, accept, act) for key, value in item.items()}
    return item


def get_tensor_bytes(item: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, Mapping):
        return sum(get_tensor_bytes(value) for value in item.values())
    if isinstance(item, list | tuple):
        return sum(get_tensor_bytes(value) for value in item)
    return 0


# ------------------------------------------------------------------ norms, clipping, overflow
def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Say whether a param is a share of a layer's weights (and not the same on all shares)."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def has_inf_or_nan(x: torch.Tensor) -> torch.Tensor:
    """Return a 0-dim bool tensor: whether any element is infinite or not a number."""
    return torch.logical_not(torch.isfinite(x)).any()


def is_invalid_grad_norm(norm: float | torch.Tensor) -> bool:
    """Say whether a norm is infinite, not a number, or the -1 that stands for those."""
    value = float(norm)
    return value == -1 or not math.isfinite(value)


def _norms(tensors: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return the norm of all elements of all tensors, 0-dim, float32 for lower precisions.

    The sum of each tensor is taken first, then that of the sums: torch.nn.utils does the same, so
    clipping agrees with it bit for bit.
    """
    if not tensors:
        return torch.zeros(())
    device = tensors[0].device
    each = [
        torch.linalg.vector_norm(
            tensor.detach(), norm_type, dtype=torch.float32 if tensor.itemsize < 4 else None
        ).to(device)
        for tensor in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(each), norm_type)


def _counted(params: Iterable[torch.Tensor], mpu: Any) -> list[torch.Tensor]:
    """Return the params that this rank counts, so that each element of the model counts once."""
    first = bwc_tensor_model_parallel_rank(mpu) == 0
    return [
        param
        for param in params
        if not (mpu is not None and getattr(param, PIPE_REPLICATED, False))
        and (first or is_model_parallel_parameter(param))
    ]


def _over_model(norm: torch.Tensor, norm_type: float, mpu: Any) -> torch.Tensor:
    """Combine the shares' norms over a client's tensor- and pipeline-parallel ranks."""
    for size, group in (
        (bwc_tensor_model_parallel_world_size, bwc_tensor_model_parallel_group),
        (bwc_pipeline_parallel_world_size, bwc_pipeline_parallel_group),
    ):
        if mpu is None or size(mpu) <= 1:
            continue
        if norm_type == math.inf:
            dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=group(mpu))
        else:
            norm = norm.pow(norm_type)
            dist.all_reduce(norm, group=group(mpu))
            norm = norm.pow(1.0 / norm_type)
    return norm


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2,
    mpu: Any = None,
) -> torch.Tensor:
    """Scale gradients so that their common norm is at most ``max_norm``; return the norm before.

    Args:
        parameters: params whose ``grad`` is scaled in place; those without one are left out.
        max_norm: the limit.
        norm_type: 2, another exponent, or inf.
        mpu: a client's model-parallel unit, over whose ranks the norm is combined.

    Returns:
        The norm, a 0-dim tensor on the gradients' device.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    params = [param for param in params if param.grad is not None]
    if not params:
        return torch.zeros(())
    norm_type = float(norm_type)
    grads = [param.grad for param in _counted(params, mpu) if param.grad is not None]
    total = _over_model(_norms(grads, norm_type), norm_type, mpu)
    if any(not getattr(param, "allreduce", True) for param in params) and dist.is_initialized():
        # experts' gradients differ between data-parallel ranks; shared params need one factor
        from deepspeed.utils import groups

        total = total / groups._get_data_parallel_world_size()
        dist.all_reduce(total, group=groups._get_data_parallel_group())
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    for param in params:
        assert param.grad is not None
        param.grad.detach().mul_(factor.to(param.grad.device))
    return total


def get_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2, mpu: Any = None
) -> float:
    """Return the norm of the gradients; -1 when it is infinite or not a number."""
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [param.grad for param in _counted(params, mpu) if param.grad is not None]
    norm = float(_over_model(_norms(grads, float(norm_type)), float(norm_type), mpu))
    return norm if math.isfinite(norm) else -1.0


def get_weight_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2, mpu: Any = None
) -> float:
    """Return the norm of the params themselves; -1 when it is infinite or not a number."""
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm = _norms(_counted(params, mpu), float(norm_type))
    value = float(_over_model(norm, float(norm_type), mpu))
    return value if math.isfinite(value) else -1.0


def get_flattened_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2,
    mpu: Any = None,
    grad_norm_mask: Any = None,
) -> float:
    """`get_grad_norm` of flat params.

    Raises:
        NotImplementedError: ``grad_norm_mask`` was given.
    """
    if grad_norm_mask is not None:
        raise NotImplementedError(explain("grad_norm_mask is not built yet"))
    return get_grad_norm(parameters, norm_type, mpu)


def get_global_norm(norm_list: Iterable[float]) -> float:
    """Return the 2-norm of a whole from the 2-norms of its parts."""
    return math.sqrt(sum(norm**2 for norm in norm_list))


def get_global_norm_of_tensors(
    input_tensors: Sequence[torch.Tensor],
    norm_type: float = 2,
    mpu: Any = None,
    moe_ep_group: Any = None,
) -> torch.Tensor:
    """Return the norm of tensors together, combined over the mpu's and the experts' ranks."""
    norm_type = float(norm_type)
    norm = _over_model(_norms(list(input_tensors), norm_type), norm_type, mpu)
    if moe_ep_group is not None:
        op = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
        powered = norm if norm_type == math.inf else norm.pow(norm_type)
        dist.all_reduce(powered, op=op, group=moe_ep_group)
        norm = powered if norm_type == math.inf else powered.pow(1.0 / norm_type)
    return norm


def clip_tensors_by_global_norm(
    input_tensors: Sequence[torch.Tensor],
    max_norm: float = 1.0,
    global_norm: float | torch.Tensor | None = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> float | torch.Tensor:
    """Scale tensors in place so that their common 2-norm is at most ``max_norm``; return the norm."""
    if global_norm is None:
        global_norm = get_global_norm_of_tensors(input_tensors, mpu=mpu)
    factor = max_norm / (float(global_norm) + eps)
    if factor < 1:
        for tensor in input_tensors:
            tensor.detach().mul_(factor)
    return global_norm


def get_grad_zeros(parameters: Iterable[torch.Tensor], mpu: Any = None) -> float:
    """Return how many elements of the gradients are zero."""
    grads = [param.grad for param in _counted(parameters, mpu) if param.grad is not None]
    count = torch.tensor(float(sum(grad.numel() - int(grad.count_nonzero()) for grad in grads)))
    return float(_over_model(count, 1.0, mpu))


class CheckOverflow:
    """Looks for gradients that are infinite or not numbers, over all ranks that share the model.

    Args:
        param_groups: lists of params.
        mpu: a client's model-parallel unit.
        zero_reduce_scatter: gradients are split over all ranks: ask all of them.
        deepspeed: accepted for compatibility.
    """

    def __init__(
        self,
        param_groups: Sequence[Iterable[torch.Tensor]] | None = None,
        mpu: Any = None,
        zero_reduce_scatter: bool = False,
        deepspeed: Any = None,
    ) -> None:
        self.mpu = mpu
        self.params = [param for group in param_groups or [] for param in group]
        self.zero_reduce_scatter = zero_reduce_scatter
        self.deepspeed = deepspeed

    def check(self, param_groups: Sequence[Iterable[torch.Tensor]] | None = None) -> bool:
        """Say whether any gradient of the params (or of the given groups) overflowed."""
        if param_groups is None:
            return self.has_overflow(self.params)
        return self.has_overflow([param for group in param_groups for param in group])

    def has_overflow_serial(self, params: Iterable[torch.Tensor]) -> bool:
        """Say whether any gradient on this rank overflowed."""
        return any(bool(has_inf_or_nan(param.grad)) for param in params if param.grad is not None)

    def has_overflow(
        self, params: Sequence[torch.Tensor], has_moe_params: bool | None = None
    ) -> bool:
        """Say whether any gradient overflowed on any rank that shares the model. Collective."""
        found = self.has_overflow_serial(params)
        everybody = self.zero_reduce_scatter or bool(has_moe_params)
        everybody = everybody or any(not getattr(param, "allreduce", True) for param in params)
        return self._vote(found, everybody)

    def check_using_norm(self, norm_group: Sequence[float], reduce_overflow: bool = True) -> bool:
        """Say whether any of the norms stands for an overflow. Collective with ``reduce_overflow``."""
        return self._vote(any(map(is_invalid_grad_norm, norm_group)), reduce_overflow)

    def _vote(self, found: bool, everybody: bool) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return found
        flag = torch.tensor([float(found)], device=get_accelerator().current_device_name())
        if everybody:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        else:
            flag = _over_model(flag, math.inf, self.mpu)
        return bool(flag.item())

    @staticmethod
    def _has_inf_or_nan(x: torch.Tensor, i: Any = None) -> torch.Tensor:
        return has_inf_or_nan(x)


# ------------------------------------------------------------------ partitions
def prefix_sum_inc(weights: Sequence[Any]) -> list[Any]:
    """Return the running sums, each with its own weight included."""
    return list(accumulate(weights))


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Split items in order into parts whose sizes differ by one at most, longer ones first.

    Returns:
        ``num_parts + 1`` bounds: part i is ``[bounds[i], bounds[i + 1])``.
    """
    size, longer = divmod(num_items, num_parts)
    return [i * size + min(i, longer) for i in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Split items in order so that the heaviest part is as light as possible.

    Returns:
        ``num_parts + 1`` bounds: part i is ``[bounds[i], bounds[i + 1])``.
    """
    count = len(weights)
    if count <= num_parts:
        return partition_uniform(count, num_parts)
    sums = [0, *accumulate(weights)]
    # heaviest[i]: the lightest possible heaviest part of the first i items, in the parts so far
    heaviest = [float(total) for total in sums]
    cuts: list[list[int]] = []
    for _ in range(1, num_parts):
        best, cut = list(heaviest), [0] * (count + 1)
        for end in range(count + 1):
            best[end], cut[end] = min(
                (max(heaviest[middle], sums[end] - sums[middle]), middle)
                for middle in range(end + 1)
            )
        heaviest = best
        cuts.append(cut)
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return [*reversed([*bounds, 0])]


class PartitionedTensor:
    """A tensor of which each rank of a group holds a slice.

    Args:
        tensor: the whole tensor, the same on every rank.
        group: the process group.
        partition_meta: accepted for compatibility.
    """

    def __init__(self, tensor: torch.Tensor, group: Any, partition_meta: Any = None) -> None:
        self._join(group)
        self.orig_size = list(tensor.size())
        self.orig_device = tensor.device
        self.partition = partition_uniform(tensor.numel(), self.num_parts)
        start, end = self.partition[self.rank], self.partition[self.rank + 1]
        self.local_data = tensor.detach().reshape(-1)[start:end].clone()

    def _join(self, group: Any) -> None:
        self.group = group
        self.num_parts = dist.get_world_size(group=group)
        self.rank = dist.get_rank(group=group)

    @classmethod
    def from_meta(
        cls, meta: torch.Tensor, local_part: torch.Tensor, group: Any, device: Any = "cpu"
    ) -> PartitionedTensor:
        """Rebuild from `to_meta` and this rank's slice."""
        made = cls.__new__(cls)
        made._join(group)
        made.orig_device = torch.device(device)
        values = [int(value) for value in meta.tolist()]
        dims = values[0]
        made.orig_size = values[1 : 1 + dims]
        parts = values[1 + dims]
        if parts != made.num_parts:
            raise ValueError(
                explain("the slices belong to another group", got=parts, expected=made.num_parts)
            )
        made.partition = values[3 + dims :]
        made.local_data = local_part
        return made

    def to_meta(self) -> torch.Tensor:
        """Return what `from_meta` needs, a 1-D int64 tensor: sizes, parts, rank, bounds."""
        values = [len(self.orig_size), *self.orig_size, self.num_parts, self.rank, *self.partition]
        return torch.tensor(values, dtype=torch.int64)

    def full(self, device: Any = None) -> torch.Tensor:
        """Return the whole tensor. Collective."""
        sizes = [
            end - start for start, end in zip(self.partition, self.partition[1:], strict=False)
        ]
        longest = max(sizes)  # every rank sends as much: not all backends take unequal shares
        own = self.local_data.new_zeros(longest)
        own[: self.local_data.numel()] = self.local_data
        gathered = own.new_empty(longest * self.num_parts)
        dist.all_gather_into_tensor(gathered, own, group=self.group)
        parts = (
            [part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)]
            if longest
            else [own]
        )
        return (
            torch.cat(parts).view(self.orig_size).to(self.orig_device if device is None else device)
        )

    def data(self) -> torch.Tensor:
        """Return this rank's slice."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """Return the size of this rank's slice."""
        return self.local_data.size()

    def full_size(self) -> list[int]:
        """Return the size of the whole tensor."""
        return self.orig_size


def align_dense_tensors(tensor_list: Sequence[torch.Tensor], alignment: int) -> list[torch.Tensor]:
    """Return the tensors, followed by zeros that bring the number of elements to a multiple."""
    tensors = list(tensor_list)
    missing = -sum(tensor.numel() for tensor in tensors) % alignment
    if missing:
        tensors.append(tensors[0].new_zeros(missing))
    return tensors


# ------------------------------------------------------------------ memory
def empty_cache() -> None:
    """Give cached device memory back."""
    get_accelerator().empty_cache()


def _speaks() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def see_memory_usage(message: str, force: bool = False) -> None:
    """Print the memory in use on rank 0, and begin a new peak measurement.

    Args:
        message: the first line.
        force: without it nothing happens.
    """
    if not force or not _speaks():
        return
    gc.collect()
    machine = get_accelerator()
    used, peak = machine.memory_allocated() / _GB, machine.max_memory_allocated() / _GB
    held, top = machine.memory_reserved() / _GB, machine.max_memory_reserved() / _GB
    print(message)
    print(
        f"MA {used:.2f} GB         Max_MA {peak:.2f} GB         "
        f"CA {held:.2f} GB         Max_CA {top:.0f} GB "
    )
    host = psutil.virtual_memory()
    print(
        f"CPU Virtual Memory:  used = {(host.total - host.available) / _GB:.2f} GB, percent = {host.percent}%"
    )
    machine.reset_peak_memory_stats()


_last = {"allocated": 0.0, "cached": 0.0}


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Print a line of memory statistics, with the change since the last one.

    Args:
        msg: put in the line.
        print_rank: who prints; -1 is everybody.
        reset_max: begin a new peak measurement first.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if print_rank not in (-1, rank):
        return
    machine = get_accelerator()
    machine.synchronize()
    if reset_max:
        machine.reset_peak_memory_stats()
    used, held = machine.memory_allocated() / _GB, machine.memory_reserved() / _GB
    peak, top = machine.max_memory_allocated() / _GB, machine.max_memory_reserved() / _GB
    print(
        f"RANK={rank} MEMSTATS {msg} device={machine.current_device_name()} "
        f"current alloc={used:0.4f}GB (delta={used - _last['allocated']:0.4f}GB max={peak:0.4f}GB) "
        f"current cache={held:0.4f}GB (delta={held - _last['cached']:0.4f}GB max={top:0.4f}GB)"
    )
    _last.update(allocated=used, cached=held)


def get_ma_status() -> int:
    """Return the bytes in use on rank 0, 0 elsewhere."""
    return get_accelerator().memory_allocated() if _speaks() else 0
