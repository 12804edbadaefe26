# SPDX-License-Identifier: Apache-2.0
"""The verbs that ZeRO moves flat buffers with, over one axis of the mesh.

Each has three ways: one process (a copy or nothing), a backend with the verb (NCCL), and gloo.

[Note: gloo moves bytes]
    gloo lacks reduce-scatter and bf16 arithmetic in older torch versions, and most verbs for CUDA
    tensors. What it always has is an exchange of bytes between all ranks. So on gloo each owner
    receives its share from every rank and adds up itself, in fp32 for bf16 and fp16, in the order of
    the ranks: the traffic of a reduce-scatter, a better sum, and the same bits on every run. CUDA
    tensors go through page-locked host memory. Against torch's own verb on gloo it is
    about as fast for small buffers, and 1.1 to 4.1 times as fast for 4 M fp32 elements
    (benchmarks/gloo_reduce_scatter.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.utils.errors import DeepSpeedCommError, explain

from .handles import DONE, Handle, _close, _Pending
from .mesh import Axis
from .profiling import watched
from .sums import add_up

Segment = tuple[int, int, int]
"""(index of the owner in the axis, first element, number of elements)"""

_LOW = (torch.float16, torch.bfloat16)

# below this many elements a low-precision sum goes as one fp32 all-reduce: fewer messages
_SMALL = 1 << 14


# torch 2.13 renamed these two and warns about the old names
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


# Gathers over each set of ranks so far: all of its ranks agree on the number, so it tells messages apart.
_gathers: dict[tuple[int, ...], int] = {}
_FIRST_TAG, _TAGS = 1_000_000, 1_000_000

# Host buffers that arriving bytes land in, kept from one exchange to the next: new memory costs more than the copy.
# Whoever exchanges a lot calls `free_inboxes` when it is done for a while.
_inboxes: list[torch.Tensor] = []
_INBOXES_KEPT = 2


def _take_inbox(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat host tensor, the beginning of a larger one perhaps."""
    nbytes = numel * dtype.itemsize
    for place, inbox in enumerate(_inboxes):
        if nbytes <= inbox.numel() <= 2 * nbytes:
            return _inboxes.pop(place)[:nbytes].view(dtype)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu").view(dtype)


def _keep_inbox(inbox: torch.Tensor) -> None:
    storage = inbox.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    _inboxes.append(whole)
    del _inboxes[:-_INBOXES_KEPT]


def free_inboxes() -> None:
    """Give back the memory that is kept from one exchange to the next."""
    _inboxes.clear()


def backend_name(axis: Axis, device: torch.device) -> str:
    """Return the backend ("gloo", "nccl", ...) that serves tensors on ``device`` over the axis.

    A gloo group serves CUDA tensors too: through host memory.

    Raises:
        DeepSpeedCommError: the group's backend cannot take tensors from that device.
    """
    for kind in (device.type, "cpu"):
        try:
            return str(axis.group._get_backend(torch.device(kind)).name())
        except RuntimeError:
            continue
    raise DeepSpeedCommError(
        explain(
            "the process group cannot move this tensor",
            got=f"a tensor on {device} with backend {dist.get_backend(axis.group)}",
            expected="a CUDA tensor for nccl, any tensor for gloo",
            fix='Move the tensor, or call init_distributed(dist_backend="gloo").',
        )
    )


def _through_bytes(axis: Axis, tensor: torch.Tensor) -> bool:
    return backend_name(axis, tensor.device) == "gloo"


def _require_flat(what: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise DeepSpeedCommError(
                explain(
                    f"{what} works on flat buffers",
                    got=f"shape {tuple(tensor.shape)}, strides {tensor.stride()}",
                    expected="contiguous 1-D tensors",
                )
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # One element is contiguous whatever its stride, but then torch does not look at it as bytes.
    flat = tensor.detach()
    return (flat.as_strided((1,), (1,)) if flat.numel() == 1 else flat).view(torch.uint8)


def _host(tensor: torch.Tensor, copy: bool = True) -> torch.Tensor:
    """Return the tensor itself when it is on the host, else a page-locked stand-in."""
    if tensor.device.type == "cpu":
        return tensor.detach()
    # by a method: zero.Init makes what torch.empty is asked for on the device
    pinned = tensor.new_empty(tensor.shape, device="cpu", pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor.detach()) if copy else pinned


# ------------------------------------------------------------------ all-gather
@watched("all_gather_into_tensor", "out")
def all_gather_into(
    out: torch.Tensor, shard: torch.Tensor, axis: Axis, async_op: bool = False
) -> Handle:
    """Put every rank's shard, in the order of the axis, into ``out``.

    Args:
        out: flat, ``axis.size * shard.numel()`` elements of the shard's dtype and device.
        shard: flat; may be this rank's own slice of ``out``.
        axis: who takes part.
        async_op: return at once; the result is there after ``wait()``.

    Raises:
        DeepSpeedCommError: the sizes or dtypes do not fit.
    """
    _require_flat("all_gather_into", out, shard)
    if out.numel() != axis.size * shard.numel() or out.dtype != shard.dtype:
        raise DeepSpeedCommError(
            explain(
                "all_gather_into: the buffers do not fit",
                got=f"{out.numel()} x {out.dtype} for shards of {shard.numel()} x {shard.dtype}",
                expected=f"{axis.size * shard.numel()} x {shard.dtype}",
            )
        )
    if shard.numel() == 0:
        return DONE
    if axis.size == 1:
        if out.data_ptr() != shard.data_ptr():
            out.detach().copy_(shard.detach())
        return DONE
    if axis.hops is not None:
        return _close(_gather_in_hops(out.detach(), shard.detach(), *axis.hops), async_op)
    if not _through_bytes(axis, out):
        work = _all_gather(out.detach(), shard.detach(), group=axis.group, async_op=True)
        return _close(_Pending([work], keep=(out, shard)), async_op)
    source, target = _host(shard), _host(out, copy=False)
    works = _send_to_all(_bytes(target), _bytes(source), axis)

    return _close(_Pending(works, _copy_back(out, target), keep=(source, target)), async_op)


def _gather_in_hops(out: torch.Tensor, shard: torch.Tensor, node: Axis, nodes: Axis) -> Handle:
    """Gather from the ranks at the same place of all machines, then from the neighbours on this one."""
    column = shard.new_empty(nodes.size * shard.numel())
    first = all_gather_into(column, shard, nodes, async_op=True)

    def finish() -> None:
        rows = torch.empty_like(out)
        all_gather_into(rows, column, node)
        pieces = rows.view(node.size, nodes.size, -1)
        out.view(nodes.size, node.size, -1).copy_(pieces.transpose(0, 1))

    # the second hop starts when the caller waits: every rank waits in the same order
    return _Pending([first], finish, keep=(column, shard))


# ------------------------------------------------------------------ exchange
@watched("all_to_all_single", "out")
def exchange(out: torch.Tensor, parts: torch.Tensor, axis: Axis, async_op: bool = False) -> Handle:
    """Give each rank its part, and get this rank's parts from all.

    Args:
        out: flat; afterwards the parts that the ranks had for this one, in the order of the axis.
        parts: flat, as large; equal parts, one for each rank in the order of the axis.
        axis: who takes part.
        async_op: return at once; the result is there after ``wait()``.

    Raises:
        DeepSpeedCommError: the sizes or dtypes do not fit.
    """
    _require_flat("exchange", out, parts)
    if out.numel() != parts.numel() or parts.numel() % axis.size or out.dtype != parts.dtype:
        raise DeepSpeedCommError(
            explain(
                "exchange: the buffers do not fit",
                got=f"{out.numel()} x {out.dtype} for {parts.numel()} x {parts.dtype}",
                expected=f"equal ones of a multiple of {axis.size} elements",
            )
        )
    if axis.size == 1 or not parts.numel():
        out.detach().copy_(parts.detach())
        return DONE
    if not _through_bytes(axis, out):
        work = dist.all_to_all_single(out.detach(), parts.detach(), group=axis.group, async_op=True)
        return _close(_Pending([work], keep=(out, parts)), async_op)
    source, target = _host(parts), _host(out, copy=False)
    work = dist.all_to_all_single(_bytes(target), _bytes(source), group=axis.group, async_op=True)

    return _close(_Pending([work], _copy_back(out, target), keep=(source, target)), async_op)


def _copy_back(out: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """What is left to do once `target`, which stood for `out` on the host, has arrived."""

    def finish() -> None:
        if target.device != out.device:
            out.detach().copy_(target, non_blocking=True)

    return finish


def _send_to_all(target: torch.Tensor, source: torch.Tensor, axis: Axis) -> list[Any]:
    """Send the own piece to each rank, and receive theirs in place; gloo's own verb goes through a copy of all pieces."""
    number = _gathers.get(axis.ranks, 0)
    _gathers[axis.ranks] = number + 1
    tag, pieces, works = _FIRST_TAG + number % _TAGS, target.chunk(axis.size), []
    for index, rank in enumerate(axis.ranks):
        if index != axis.rank:
            works.append(dist.irecv(pieces[index], src=rank, group=axis.group, tag=tag))
            works.append(dist.isend(source, dst=rank, group=axis.group, tag=tag))
    if pieces[axis.rank].data_ptr() != source.data_ptr():
        pieces[axis.rank].copy_(source)
    return works


# ------------------------------------------------------------------ reduce to owners
@watched("reduce_scatter_tensor", "full")
def reduce_scatter_into(
    shard: torch.Tensor, full: torch.Tensor, axis: Axis, async_op: bool = False
) -> Handle:
    """Sum ``full`` over the axis; each rank gets its slice of the sum.

    Args:
        shard: flat; may be this rank's own slice of ``full``.
        full: flat, ``axis.size * shard.numel()`` elements; its contents are undefined afterwards
            when ``shard`` is a slice of it, else unchanged.
        axis: who takes part.
        async_op: return at once; the result is there after ``wait()``.

    Raises:
        DeepSpeedCommError: the sizes or dtypes do not fit.
    """
    _require_flat("reduce_scatter_into", shard, full)
    if full.numel() != axis.size * shard.numel() or full.dtype != shard.dtype:
        raise DeepSpeedCommError(
            explain(
                "reduce_scatter_into: the buffers do not fit",
                got=f"{full.numel()} x {full.dtype} for shards of {shard.numel()} x {shard.dtype}",
                expected=f"{axis.size * shard.numel()} x {shard.dtype}",
            )
        )
    if shard.numel() == 0:
        return DONE
    if axis.size == 1:
        if full.data_ptr() != shard.data_ptr():
            shard.detach().copy_(full.detach())
        return DONE
    if not _through_bytes(axis, full):
        work = _reduce_scatter(shard.detach(), full.detach(), group=axis.group, async_op=True)
        return _close(_Pending([work], keep=(shard, full)), async_op)
    each = shard.numel()
    return _close(
        _exchange_and_sum(_host(full), [each] * axis.size, [(shard.detach(), 0)], axis), async_op
    )


@watched("reduce_scatter_tensor", "flat")
def reduce_to_owners(
    flat: torch.Tensor, segments: Sequence[Segment], axis: Axis, async_op: bool = False
) -> Handle:
    """Sum parts of a buffer over the axis, each part onto the rank that owns it.

    Afterwards each owner's segments of ``flat`` hold the sums; the rest of the segments is undefined,
    what no segment covers is unchanged.

    Args:
        flat: flat buffer, the same size and dtype on every rank.
        segments: (owner's index in the axis, start, length), the same on every rank, disjoint.
        axis: who takes part.
        async_op: return at once; the result is there after ``wait()``.

    Raises:
        DeepSpeedCommError: a segment lies outside the buffer or its owner outside the axis.
    """
    _require_flat("reduce_to_owners", flat)
    for owner, start, length in segments:
        if not 0 <= owner < axis.size or start < 0 or length < 0 or start + length > flat.numel():
            raise DeepSpeedCommError(
                explain(
                    "reduce_to_owners: impossible segment",
                    got=(owner, start, length),
                    expected=f"owner < {axis.size}, elements within {flat.numel()}",
                )
            )
    parts = sorted(segment for segment in segments if segment[2])
    if axis.size == 1 or not parts:
        return DONE
    flat = flat.detach()
    if not _through_bytes(axis, flat):
        return _close(_reduce_native(flat, parts, axis), async_op)
    splits = [sum(length for owner, _, length in parts if owner == r) for r in range(axis.size)]
    own, at = [], 0
    for owner, start, length in parts:
        if owner == axis.rank:
            own.append((flat[start : start + length], at))
            at += length
    return _close(_exchange_and_sum(_host(_pack(flat, parts)), splits, own, axis), async_op)


def _pack(flat: torch.Tensor, parts: Sequence[Segment]) -> torch.Tensor:
    """Return the parts one after the other: a view where they lie so already, else a copy."""
    first = parts[0][1]
    end = first
    for _, start, length in parts:
        if start != end:
            return torch.cat([flat[start : start + length] for _, start, length in parts])
        end += length
    return flat[first:end]


def _reduce_native(flat: torch.Tensor, parts: Sequence[Segment], axis: Axis) -> Handle:
    each = parts[0][2]
    regular = [(r, parts[0][1] + r * each, each) for r in range(axis.size)]
    if list(parts) == regular:
        full = flat[parts[0][1] : parts[0][1] + each * axis.size]
        shard = full[axis.rank * each : (axis.rank + 1) * each]
        work = _reduce_scatter(shard, full, group=axis.group, async_op=True)
        return _Pending([work], keep=flat)
    works = [
        dist.reduce(
            flat[start : start + length], axis.ranks[owner], group=axis.group, async_op=True
        )
        for owner, start, length in parts
    ]
    return _Pending(works, keep=flat)


def _exchange_and_sum(
    packed: torch.Tensor,
    splits: Sequence[int],
    targets: Sequence[tuple[torch.Tensor, int]],
    axis: Axis,
) -> Handle:
    """Send each owner its part of ``packed``; add up what arrives into the own targets.

    Args:
        packed: host tensor, the owners' parts in the order of the axis.
        splits: number of elements of each owner.
        targets: (where to put the sum, its offset in the own part).
        axis: who takes part.

    See [Note: gloo moves bytes].
    """
    size = packed.element_size()
    mine = splits[axis.rank]
    inbox = _take_inbox(mine * axis.size, packed.dtype)
    work = dist.all_to_all_single(
        _bytes(inbox),
        _bytes(packed),
        output_split_sizes=[mine * size] * axis.size,
        input_split_sizes=[n * size for n in splits],
        group=axis.group,
        async_op=True,
    )

    def finish() -> None:
        arrived = inbox.view(axis.size, mine)
        for target, at in targets:
            add_up(target, arrived.narrow(1, at, target.numel()))
        _keep_inbox(inbox)

    return _Pending([work], finish, keep=packed)


# ------------------------------------------------------------------ all-reduce, broadcast, vote
_OPS = {"sum": "SUM", "max": "MAX", "min": "MIN"}


@watched("all_reduce", "tensor")
def all_reduce_(
    tensor: torch.Tensor, axis: Axis, op: str = "sum", async_op: bool = False
) -> Handle:
    """Reduce a tensor over the axis, in place; every rank gets the result.

    Args:
        tensor: any shape, strides and numeric dtype.
        axis: who takes part.
        op: "sum", "max" or "min".
        async_op: return at once; the result is there after ``wait()``.

    Raises:
        DeepSpeedCommError: there is no such operation.
    """
    if op not in _OPS:
        raise DeepSpeedCommError(explain("unknown reduction", got=op, expected=", ".join(_OPS)))
    if axis.size == 1 or tensor.numel() == 0:
        return DONE
    tensor = tensor.detach()
    torch_op = getattr(dist.ReduceOp, _OPS[op])
    gloo = _through_bytes(axis, tensor)
    if gloo and op == "sum" and tensor.dtype in _LOW and tensor.numel() > _SMALL:
        return _close(_all_reduce_in_two(tensor, axis), async_op)
    wire = tensor
    if gloo:
        wire = _host(tensor)
        if tensor.dtype in _LOW:
            wire = wire.float()  # older torch cannot add bf16 on gloo; and the sum is better so
        elif tensor.dtype == torch.bool:
            wire = wire.to(torch.int32)
    wire = wire.contiguous()
    work = dist.all_reduce(wire, op=torch_op, group=axis.group, async_op=True)

    def finish() -> None:
        if wire.data_ptr() != tensor.data_ptr() or wire.device != tensor.device:
            tensor.copy_(wire)

    return _close(_Pending([work], finish), async_op)


def _all_reduce_in_two(tensor: torch.Tensor, axis: Axis) -> Handle:
    """Sum low-precision numbers: reduce-scatter with fp32 sums, then all-gather, both as bytes."""
    each = -(-tensor.numel() // axis.size)
    padded = tensor.new_zeros(each * axis.size)
    padded[: tensor.numel()].copy_(tensor.reshape(-1))
    shard = tensor.new_empty(each)
    scatter = _exchange_and_sum(padded, [each] * axis.size, [(shard, 0)], axis)

    def finish() -> None:
        all_gather_into(padded, shard, axis)
        tensor.copy_(padded[: tensor.numel()].view(tensor.shape))

    # the second half starts when the caller waits: every rank waits in the same order
    return _Pending([scatter], finish)


@watched("broadcast", "tensor")
def broadcast_(tensor: torch.Tensor, axis: Axis, src: int = 0) -> None:
    """Copy the tensor of one rank to all ranks of the axis.

    Args:
        tensor: any shape (0-dim included), strides and dtype; overwritten on the other ranks.
        axis: who takes part.
        src: index in the axis of the rank that has the value.

    Raises:
        DeepSpeedCommError: ``src`` is outside the axis.
    """
    if not 0 <= src < axis.size:
        raise DeepSpeedCommError(
            explain("broadcast from nobody", got=src, expected=f"an index below {axis.size}")
        )
    if axis.size == 1 or tensor.numel() == 0:
        return
    tensor = tensor.detach()
    wire = tensor
    if _through_bytes(axis, tensor):
        wire = _host(tensor)
    wire = wire.contiguous().reshape(-1)
    dist.broadcast(_bytes(wire), axis.ranks[src], group=axis.group)
    if axis.rank != src and (wire.data_ptr() != tensor.data_ptr() or wire.device != tensor.device):
        tensor.copy_(wire.view(tensor.shape))


def all_ok(ok: bool, axis: Axis) -> bool:
    """Vote: return True on every rank when every rank said True, else False on every rank."""
    if axis.size == 1:
        return ok
    device = torch.device("cpu")
    try:
        axis.group._get_backend(device)
    except RuntimeError:
        device = torch.device("cuda", torch.cuda.current_device())
    vote = torch.tensor([int(ok)], dtype=torch.int32, device=device)
    all_reduce_(vote, axis, op="min")
    return bool(vote.item())
