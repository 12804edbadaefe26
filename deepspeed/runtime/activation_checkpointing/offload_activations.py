# SPDX-License-Identifier: Apache-2.0
"""Inputs of checkpointed layers wait for the backward pass in host memory; everything else stays where it is.

A checkpointed layer keeps one tensor, its input. Inside the context of `CheckpointHiddenStatesOffload` those inputs are
marked (for layers of transformers: by themselves), copied to the host when autograd saves them, and copied back when
the backward pass asks for them, the next one ahead of time.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain

_BufferKey = tuple[tuple[int, ...], torch.dtype]


@dataclass
class OffloadStats:
    """What happened since the manager was made, or `reset()`.

    Attributes:
        saved_tensors_seen: tensors that autograd saved inside the context.
        marked_tensors: tensors that were marked.
        offloaded_tensors: copied to the host.
        restored_tensors: of those, needed again.
        skipped_marked_tensors: left where they were, since they are small, on the host, or overlap themselves.
        kept_last_tensors: needed again while they were among the last ones, which stay on the device.
    """

    saved_tensors_seen: int = 0
    marked_tensors: int = 0
    offloaded_tensors: int = 0
    restored_tensors: int = 0
    skipped_marked_tensors: int = 0
    kept_last_tensors: int = 0


class _Saved:
    """What autograd's graph holds in place of a marked tensor; its host memory is free again when it dies."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number = number
        self.size, self.stride, self.device = tensor.size(), tensor.stride(), tensor.device
        self.version = tensor._version
        self.needed_before = False


class CheckpointHiddenStatesOffload:
    """Context manager that keeps marked tensors on the host between forward and backward pass.

    Both passes belong inside the context, or the backward pass after it. One context at a time; managers may nest, and
    the innermost then has the tensors.

    Args:
        use_pin_memory: copy to page-locked memory, without which copies do not overlap with work.
        use_streams: copy beside the work, on a stream of its own.
        min_offload_bytes: smaller tensors stay.
        max_fwd_stash_count: copies to the host that may be under way, each of which keeps its tensor on the device.
        max_cpu_buffer_pool_count: host buffers that are kept for the next tensors of their shape.
        keep_last_count: so many of the last marked tensors stay, since the backward pass starts with them.

    Raises:
        ValueError: a number below 0.

    Example:
        >>> offload = CheckpointHiddenStatesOffload()
        >>> with offload:
        ...     x = torch.ones(2, requires_grad=True)
        ...     offload.mark(x)
        ...     torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool = True,
        min_offload_bytes: int = 1024,
        max_fwd_stash_count: int = 2,
        max_cpu_buffer_pool_count: int = 64,
        keep_last_count: int = 1,
    ) -> None:
        numbers = {
            "min_offload_bytes": min_offload_bytes,
            "max_fwd_stash_count": max_fwd_stash_count,
            "max_cpu_buffer_pool_count": max_cpu_buffer_pool_count,
            "keep_last_count": keep_last_count,
        }
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(explain(f"{name} cannot be", got=value, expected="0 or more"))
        self.use_pin_memory, self.min_offload_bytes = use_pin_memory, min_offload_bytes
        self.use_streams = use_streams and not get_accelerator().is_synchronized_device()
        self.max_fwd_stash_count, self.keep_last_count = max_fwd_stash_count, keep_last_count
        self.max_cpu_buffer_pool_count = max_cpu_buffer_pool_count
        self.stats = OffloadStats()
        self._next_id = 0
        self._marks: dict[int, weakref.ref[Tensor]] = {}
        self._keep_last: OrderedDict[int, Tensor] = OrderedDict()
        # number -> host buffer, event after which it may be read
        self._tracker: dict[int, tuple[Tensor, Any]] = {}
        self._alive: weakref.WeakValueDictionary[int, _Saved] = weakref.WeakValueDictionary()
        self._fwd_stash: deque[tuple[Tensor, Any]] = deque()
        self._prefetched: dict[int, tuple[Tensor, Any]] = {}
        # shape and dtype -> host buffers, each with the event after which it may be written
        self._cpu_buffer_pool: dict[_BufferKey, list[tuple[Tensor, Any]]] = {}
        self._cpu_buffer_pool_count = 0
        self._copies: Any = None
        self._hooks: Any = None

    # - the context

    def __enter__(self) -> CheckpointHiddenStatesOffload:
        if self._hooks is not None:
            raise RuntimeError(
                explain(
                    "the manager is not re-entrant",
                    got="a second 'with' inside its own",
                    fix="make another manager, or leave this one first",
                )
            )
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack_tensor, self._restore)
        self._hooks.__enter__()
        _Marking.begin(self)
        return self

    def __exit__(self, *raised: Any) -> None:
        hooks, self._hooks = self._hooks, None
        _Marking.end(self)
        hooks.__exit__(*raised)
        self._marks.clear()
        self._wait_for_copies(0)

    def mark(self, tensor: Any) -> None:
        """Have `tensor` offloaded when autograd next saves it."""
        if isinstance(tensor, Tensor):
            self.stats.marked_tensors += 1
            self._marks[id(tensor)] = weakref.ref(tensor)

    def reset(self) -> None:
        """Forget the statistics and the buffers that no tensor is in."""
        self.stats = OffloadStats()
        self._cpu_buffer_pool.clear()
        self._cpu_buffer_pool_count = 0

    # - what autograd calls

    def _pack_tensor(self, tensor: Tensor) -> Any:
        self.stats.saved_tensors_seen += 1
        if not self._consume_mark(tensor):
            return tensor
        if self._should_skip(tensor):
            self.stats.skipped_marked_tensors += 1
            return tensor
        self._next_id += 1
        saved = _Saved(self._next_id, tensor)
        self._alive[saved.number] = saved
        self._keep_last[saved.number] = tensor
        weakref.finalize(saved, self._release, saved.number).atexit = False
        while len(self._keep_last) > self.keep_last_count:
            number, oldest = self._keep_last.popitem(last=False)
            self._start_offload(number, oldest)
        return saved

    def _consume_mark(self, tensor: Tensor) -> bool:
        """Whether the tensor is a marked one, or another object over the same memory; a mark holds once."""
        for key, reference in list(self._marks.items()):
            marked = reference()
            if marked is None:
                del self._marks[key]
            elif marked is tensor or _same_memory(marked, tensor):
                del self._marks[key]
                return True
        return False

    def _should_skip(self, tensor: Tensor) -> bool:
        return (
            not get_accelerator().on_accelerator(tensor)
            or tensor.device.type == "cpu"
            or tensor.numel() * tensor.element_size() < self.min_offload_bytes
            or _overlaps_itself(tensor)
        )

    def _restore(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Saved):
            return packed
        tensor = self._keep_last.get(packed.number)
        if tensor is not None:
            _refuse_changed(packed, tensor)
            self.stats.kept_last_tensors += not packed.needed_before
        else:
            self.stats.restored_tensors += not packed.needed_before
            tensor = self._copy_back(packed)
        packed.needed_before = True
        self._prefetch(packed.number - 1)
        return tensor

    def _release(self, number: int) -> None:
        """Called when the graph lets go of a saved tensor."""
        self._keep_last.pop(number, None)
        self._prefetched.pop(number, None)
        tracked = self._tracker.pop(number, None)
        if tracked is not None and self._cpu_buffer_pool_count < self.max_cpu_buffer_pool_count:
            buffer, _ = tracked
            after = self._mark_now() if self.use_streams else None
            self._cpu_buffer_pool.setdefault(self._buffer_key(buffer), []).append((buffer, after))
            self._cpu_buffer_pool_count += 1

    # - copies

    def _buffer_key(self, tensor: Tensor) -> _BufferKey:
        return tuple(tensor.size()), tensor.dtype

    def _empty_cpu_like(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """A contiguous host buffer of the tensor's shape, and the event after which it may be written."""
        pooled = self._cpu_buffer_pool.get(self._buffer_key(tensor))
        if pooled:
            self._cpu_buffer_pool_count -= 1
            return pooled.pop()
        buffer = torch.empty(tensor.size(), dtype=tensor.dtype, device="cpu")
        if self.use_pin_memory:
            buffer = get_accelerator().pin_memory(buffer, make_copy=False)
        return buffer, None

    def _start_offload(self, number: int, tensor: Tensor) -> None:
        saved = self._alive.get(number)
        if saved is None:
            return
        _refuse_changed(saved, tensor)
        buffer, free = self._empty_cpu_like(tensor)
        self.stats.offloaded_tensors += 1
        if not self.use_streams:
            buffer.copy_(tensor.detach())
            self._tracker[number] = buffer, None
            return
        copies = self._copy_stream()
        copies.wait_stream(get_accelerator().current_stream())  # the tensor has to be there
        if free is not None:
            copies.wait_event(free)
        with get_accelerator().stream(copies):
            buffer.copy_(tensor.detach(), non_blocking=self.use_pin_memory)
            copied = self._mark_now()
        self._tracker[number] = buffer, copied
        self._fwd_stash.append((tensor, copied))
        self._wait_for_copies(self.max_fwd_stash_count)

    def _wait_for_copies(self, allowed: int) -> None:
        """Let go of tensors whose copies are made; work goes on when no more than `allowed` are under way."""
        while len(self._fwd_stash) > allowed:
            _, copied = self._fwd_stash.popleft()
            # The stream of the work waits, so that the memory's next user in it comes after the copy.
            get_accelerator().current_stream().wait_event(copied)

    def _copy_back(self, saved: _Saved) -> Tensor:
        """The tensor on its device again: the copy that was begun ahead of time, or one made now."""
        prefetched = self._prefetched.pop(saved.number, None)
        if prefetched is not None:
            tensor, ready = prefetched
            get_accelerator().current_stream().wait_event(ready)
            return tensor
        buffer, copied = self._tracker[saved.number]
        tensor = torch.empty_strided(
            saved.size, saved.stride, dtype=buffer.dtype, device=saved.device
        )
        if copied is not None:
            get_accelerator().current_stream().wait_event(copied)
        tensor.copy_(buffer, non_blocking=self.use_streams and self.use_pin_memory)
        return tensor

    def _prefetch(self, number: int) -> None:
        """Begin to copy back what the backward pass will most likely ask for next."""
        saved = self._alive.get(number)
        if not self.use_streams or saved is None or number not in self._tracker:
            return
        if saved.needed_before or number in self._prefetched:
            return
        buffer, copied = self._tracker[number]
        # Memory of the working stream: the copy comes after its earlier uses, the work after the copy.
        tensor = torch.empty_strided(
            saved.size, saved.stride, dtype=buffer.dtype, device=saved.device
        )
        copies = self._copy_stream()
        tensor.record_stream(copies)  # it may be given up before it is used
        copies.wait_stream(get_accelerator().current_stream())
        copies.wait_event(copied)
        with get_accelerator().stream(copies):
            tensor.copy_(buffer, non_blocking=self.use_pin_memory)
            self._prefetched[number] = tensor, self._mark_now()

    def _copy_stream(self) -> Any:
        if self._copies is None:
            self._copies = get_accelerator().Stream()
        return self._copies

    def _mark_now(self) -> Any:
        """An event of the current stream's present end."""
        event = get_accelerator().Event()
        event.record(get_accelerator().current_stream())
        return event


# Programs make it by this name.
get_checkpoint_hidden_states_offloading_ctx_manager = CheckpointHiddenStatesOffload


class _Marking:
    """Has checkpointed layers of transformers mark their inputs while there is a manager to mark them for."""

    managers: ClassVar[list[CheckpointHiddenStatesOffload]] = []
    layer: Any = None
    original: Any = None

    @classmethod
    def begin(cls, manager: CheckpointHiddenStatesOffload) -> None:
        cls.managers.append(manager)
        # a model of transformers has imported it; nobody else needs it
        layers = sys.modules.get("transformers.modeling_layers")
        layer = getattr(layers, "GradientCheckpointingLayer", None)
        if layer is None or cls.layer is not None:
            return
        cls.layer, cls.original = layer, layer.__call__

        @functools.wraps(cls.original)
        def marking_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if cls.managers and self.training and self.gradient_checkpointing:
                cls.managers[-1].mark(args[0] if args else kwargs.get("hidden_states"))
            return layer_call(self, *args, **kwargs)

        layer_call = cls.original
        layer.__call__ = marking_call

    @classmethod
    def end(cls, manager: CheckpointHiddenStatesOffload) -> None:
        with contextlib.suppress(ValueError):
            cls.managers.remove(manager)
        if not cls.managers and cls.layer is not None:
            cls.layer.__call__ = cls.original
            cls.layer = cls.original = None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or one.dtype != other.dtype or one.size() != other.size():
        return False
    if one.stride() != other.stride() or one.device.type == "meta" or not one.numel():
        return False
    return one.data_ptr() == other.data_ptr()


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, so that a copy could not be laid out alike."""
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size == 1:
            continue
        if stride < end:
            return True
        end = stride * (size - 1) + end
    return False


def _refuse_changed(saved: _Saved, tensor: Tensor) -> None:
    if tensor._version != saved.version:
        raise RuntimeError(
            explain(
                "a tensor that the backward pass needs has been modified by an inplace operation",
                got=f"a marked tensor of shape {tuple(saved.size)}, changed since it was saved",
                fix="clone it before the change, or do not mark it",
            )
        )
