# SPDX-License-Identifier: Apache-2.0
"""What training loops share: memory lines, seeds, partitions, small conveniences; norms come from norms.py."""

from __future__ import annotations

import contextlib
import gc
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
from deepspeed.utils.errors import explain
from deepspeed.utils.torch import required_torch_version as required_torch_version

from .norms import PIPE_REPLICATED as PIPE_REPLICATED
from .norms import CheckOverflow as CheckOverflow
from .norms import clip_grad_norm_ as clip_grad_norm_
from .norms import clip_tensors_by_global_norm as clip_tensors_by_global_norm
from .norms import get_flattened_grad_norm as get_flattened_grad_norm
from .norms import get_global_norm as get_global_norm
from .norms import get_global_norm_of_tensors as get_global_norm_of_tensors
from .norms import get_grad_norm as get_grad_norm
from .norms import get_grad_zeros as get_grad_zeros
from .norms import get_weight_norm as get_weight_norm
from .norms import has_inf_or_nan as has_inf_or_nan
from .norms import is_invalid_grad_norm as is_invalid_grad_norm
from .norms import is_model_parallel_parameter as is_model_parallel_parameter

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
        return torch.tensor(values, dtype=torch.int64, device="cpu")

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


def count_used_parameters_in_backward(parameters: Iterable[torch.Tensor]) -> int:
    """How many of the parameters the backward pass that is under way will reach, or has reached.

    Raises:
        RuntimeError: no backward pass is under way: call it from a hook.
    """
    if torch._C._current_graph_task_id() == -1:
        raise RuntimeError(
            "parameters in use are counted inside a backward pass: call it from a hook"
        )
    wanted = [param for param in parameters if param.requires_grad]
    with torch.enable_grad():  # hooks run without; the node of a leaf is found through a view of it
        nodes = [torch.autograd.graph._get_grad_fn_or_grad_acc(param) for param in wanted]
    return sum(bool(torch._C._will_engine_execute_node(node)) for node in nodes)
