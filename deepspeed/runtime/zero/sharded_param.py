# SPDX-License-Identifier: Apache-2.0
"""A parameter of which this rank keeps a slice (ZeRO stage 3): cut it, gather it, let it go.

The public face is a set of `ds_*` attributes on the parameter; `describe` and `own_slice` give it these. Between uses
`param.data` is an empty tensor. Gathering makes a new buffer each time and letting go only drops it, so whoever kept a
reference to gathered values goes on seeing them.

[Note: Narrow gathers]
What autocast computes in its own dtype is rounded to it anyhow, so module hooks may gather such parameters in that
dtype: half the bytes, equal results. The values that land are the rounded ones, in the parameter's dtype. They are for
computing only: whoever else asks for the values of a parameter that is whole in this way has it gathered again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.torch_autocast import autocast_of, get_comm_dtype, has_comm_dtype
from deepspeed.utils.errors import explain

from .blocks import Blocks
from .codec import GroupCodec, SliceCodec
from .host_copies import bring
from .own_slice import (
    ZeroParamStatus,
    ZeroParamType,
    absent,
    cut,
    is_zero_param,
    piece_of,
    slice_of,
    write_back,
)
from .second_copy import SecondCopy
from .spill import SpillFolder, together
from .tiers import Tier

# Slices below this many elements travel together: one message costs more than their bytes.
SMALL_SLICE = 64 * 1024

_ids = itertools.count()


def shard_param(
    param: torch.nn.Parameter,
    axis: Axis,
    device: torch.device,
    tier: Tier,
    folder: SpillFolder | None = None,
    codec: GroupCodec | None = None,
    home: Axis | None = None,
) -> None:
    """Keep this rank's slice of a whole parameter, on `tier`; its values must be equal on all ranks of `home`.

    Args:
        param: parameter that is not sharded yet.
        axis: ranks to cut it over.
        device: where it is gathered to.
        tier: where the slice lives.
        folder: keep it in a file there instead.
        codec: what the slice holds the values with, if not as they are.
        home: all ranks that have the parameter, where these are several times those of `axis` (MiCS).
    """
    describe(param, axis, device, home or axis)
    cut(param, tier, folder, codec)
    param.data = torch.empty(0, dtype=param.dtype, device=device)


def describe(param: torch.nn.Parameter, axis: Axis, device: torch.device, home: Axis) -> None:
    """Set the public attributes and methods of a sharded parameter."""
    if not is_zero_param(param):
        param.ds_id = next(_ids)
    param.ds_shape, param.ds_numel = param.shape, param.numel()
    param.ds_numel_aligned = -(-param.numel() // axis.size) * axis.size
    param.ds_param_type, param.ds_status = ZeroParamType.PARTITIONED, ZeroParamStatus.NOT_AVAILABLE
    param.ds_persist = False
    param.ds_active_sub_modules = set()
    param.is_external_param = False
    param.ds_axis, param.ds_home, param.ds_device = axis, home, device
    param.ds_spill = param.ds_codec = param.ds_wire = param.ds_second = None
    param.ds_packed = param.ds_narrowed = False
    param.ds_process_group, param.ds_zero_param_process_group = axis.group, None
    param.ds_zero_partition_rank, param.ds_zero_partition_world_size = axis.rank, axis.size
    param.ds_secondary_tensor, param.ds_secondary_tensor_group_size = None, 1
    param.ds_secondary_tensor_num_of_groups, param.nvme_swapper = 1, None
    param.ds_enable_sanity_checks = False
    param.all_gather = partial(_all_gather, param)
    param.all_gather_coalesced = _all_gather_coalesced
    param.partition = partial(_partition, param)
    param.aligned_size = lambda: param.ds_numel_aligned
    param.padding_size = lambda: param.ds_numel_aligned - param.ds_numel
    param.partition_numel = lambda: piece_of(param)
    param.ds_summary = partial(_summary, param)
    param.convert_to_zero_parameters = partial(_convert_like, param)
    param.item = partial(_item, param)
    param.reduce_gradients_at_owner = partial(_reduced_by_hooks, "reduce_gradients_at_owner")
    param.partition_gradients = partial(_reduced_by_hooks, "partition_gradients")


# - gather


class Gathering:
    """Parameters on their way to being whole.

    Args:
        params: parameters that are not available; they are marked as in flight.
        blocks: where whole values go; None is new memory.
        narrow: they are for computing only; see [Note: Narrow gathers].
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        blocks: Blocks | None = None,
        narrow: bool = False,
    ) -> None:
        self._launched, self._take = False, torch.empty if blocks is None else blocks.take
        self._landing: list[tuple[flat.Handle, Callable[[], None]]] = []
        backward = in_backward()
        self._sources: list[tuple[torch.nn.Parameter, SecondCopy | None]] = []
        self._file_axes: list[Axis] = []
        for param in params:
            assert param.ds_status is ZeroParamStatus.NOT_AVAILABLE
            if param.data.untyped_storage().nbytes():
                raise RuntimeError(_assigned(param))
            param.ds_status = ZeroParamStatus.INFLIGHT
            param.ds_gathering = self
            second = param.ds_second if backward else None
            second = second if second is not None and second.ready else None
            param.ds_narrowed = narrow and _may_narrow(param, backward)
            self._sources.append((param, second))
            if param.ds_spill is not None and second is None:
                param.ds_spill.start()
                if param.ds_axis not in self._file_axes:
                    self._file_axes.append(param.ds_axis)
        if not self._file_axes:
            self._launch()

    def _launch(self) -> None:
        """Start the collectives; slices that come from files must have arrived, so theirs start when waited for."""
        self._launched = True
        small: dict[tuple[Axis, torch.dtype], list[_Travel]] = {}
        for travel in self._travels():
            if travel.axis.size == 1:
                self._landing.append((travel.arriving, partial(travel.land, travel.shard)))
            elif travel.shard.numel() < SMALL_SLICE:
                small.setdefault((travel.axis, travel.shard.dtype), []).append(travel)
            else:
                self._start_one(travel)
        for (axis, _), members in small.items():
            self._start_several(axis, members)

    def _travels(self) -> list[_Travel]:
        """What this rank sends of each parameter.

        Raises:
            OSError: a file of this rank, or of another one that sends slices of the same parameters, cannot be read.
        """
        try:
            with contextlib.ExitStack() as votes:
                for axis in self._file_axes:
                    votes.enter_context(together(axis, "read its offloaded parameters"))
                return [
                    _from_all(param, self._take)
                    if second is None
                    else _from_neighbours(param, second)
                    for param, second in self._sources
                ]
        except OSError:
            for param, _ in self._sources:
                param.ds_status, param.ds_gathering = ZeroParamStatus.NOT_AVAILABLE, None
            raise

    def _start_one(self, travel: _Travel) -> None:
        shard = travel.shard
        whole = self._take(travel.axis.size * shard.numel(), dtype=shard.dtype, device=shard.device)
        handle = flat.all_gather_into(whole, shard, travel.axis, async_op=True)
        self._landing.append((handle, partial(travel.land, whole)))

    def _start_several(self, axis: Axis, members: list[_Travel]) -> None:
        shard = torch.cat([travel.shard for travel in members])
        lengths = [travel.shard.numel() for travel in members]
        rows = torch.empty(axis.size * shard.numel(), dtype=shard.dtype, device=shard.device)
        handle = flat.all_gather_into(rows, shard, axis, async_op=True)

        def land() -> None:
            at = 0
            for travel, length in zip(members, lengths, strict=True):
                travel.land(rows.view(axis.size, -1)[:, at : at + length].reshape(-1))
                at += length

        self._landing.append((handle, land))

    def wait(self) -> None:
        """Return when the parameters are whole."""
        if not self._launched:
            self._launch()
        landing, self._landing = self._landing, []
        for handle, land in landing:
            handle.wait()
            land()


def _assigned(param: torch.nn.Parameter) -> str:
    return explain(
        "values were assigned to a parameter while only its slice was there, and would be lost",
        got=f"a tensor of shape {tuple(param.shape)} as .data of a parameter of shape {tuple(param.ds_shape)}",
        expected="edits of gathered values",
        fix="edit inside deepspeed.zero.GatheredParameters(param, modifier_rank=0); for another shape put a new "
        "nn.Parameter into the module before deepspeed.initialize",
    )


@dataclass(frozen=True)
class _Travel:
    """One parameter's way to being whole: who has the pieces, this rank's, and what to do with all of them.

    `arriving`: to be waited for, where this rank's piece is all.
    """

    axis: Axis
    shard: torch.Tensor
    land: Callable[[torch.Tensor], None]
    arriving: flat.Handle = flat.DONE


def _may_narrow(param: torch.nn.Parameter, backward: bool) -> bool:
    """Whether a gather for computing may be narrow; the backward pass does as the forward pass did."""
    narrow = get_allgather_dtype(param, param.ds_tensor)
    plain = param.ds_wire is None and param.ds_codec is None and param.ds_second is None
    if not plain or param.ds_axis.size == 1 or narrow.itemsize >= param.dtype.itemsize:
        return False
    if backward:
        return param.ds_narrowed
    return not param.ds_persist and autocast_of(param.ds_device.type) == (True, narrow)


def get_allgather_dtype(param: torch.nn.Parameter, param_ds_tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a parameter travels when a module of the forward pass needs it, and autocast is on."""
    return get_comm_dtype(param) if has_comm_dtype(param) else param_ds_tensor.dtype


def _from_all(param: torch.nn.Parameter, take: Callable[..., torch.Tensor]) -> _Travel:
    shard, arriving = bring(slice_of(param), param.ds_device)
    wire = param.ds_wire
    if param.ds_axis.size > 1:  # what goes to others is made of it at once
        arriving.wait()
    if wire is not None and not param.ds_packed:
        if param.ds_axis.size == 1:
            wire = None
        else:
            shard = wire.encode(shard)
    if param.ds_narrowed:
        shard = shard.to(get_allgather_dtype(param, shard))
        return _Travel(param.ds_axis, shard, partial(_widen, param, take))
    return _Travel(param.ds_axis, shard, partial(_open, param, wire), arriving)


def _from_neighbours(param: torch.nn.Parameter, second: SecondCopy) -> _Travel:
    return _Travel(second.axis, second.part, lambda whole: _become_whole(param, whole))


def _open(param: torch.nn.Parameter, wire: SliceCodec | None, whole: torch.Tensor) -> None:
    if wire is not None:
        codes, whole = whole, whole.new_empty(param.ds_axis.size * wire.numel, dtype=wire.dtype)
        for row, values in zip(
            codes.view(-1, wire.nbytes), whole.view(-1, wire.numel), strict=True
        ):
            values.copy_(wire.decode(row))
    elif param.ds_codec is not None:
        whole = param.ds_codec.decode(whole).view(-1)
    _become_whole(param, whole)
    if param.ds_second is not None:
        param.ds_second.take(param.data)


def _widen(
    param: torch.nn.Parameter, take: Callable[..., torch.Tensor], narrow: torch.Tensor
) -> None:
    whole = take(narrow.numel(), dtype=param.dtype, device=narrow.device)
    _become_whole(param, whole.copy_(narrow))


def _become_whole(param: torch.nn.Parameter, whole: torch.Tensor) -> None:
    param.data = whole[: param.ds_numel].view(param.ds_shape)
    param.ds_status = ZeroParamStatus.AVAILABLE
    param.ds_gathering = None


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def start_gather(
    params: Iterable[torch.nn.Parameter], blocks: Blocks | None = None, narrow: bool = False
) -> None:
    """Begin to gather those of `params` that are neither whole nor on their way; a collective of all their ranks.

    Args:
        params: sharded parameters.
        blocks: where whole values go; None is new memory.
        narrow: they are for computing only; see [Note: Narrow gathers].
    """
    params = list(dict.fromkeys(params))
    if not narrow:
        release(p for p in params if p.ds_narrowed)
    missing = [p for p in params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    if missing:
        Gathering(missing, blocks, narrow)


def finish_gather(params: Iterable[torch.nn.Parameter]) -> None:
    """Wait for those of `params` that are on their way."""
    for param in params:
        if param.ds_status is ZeroParamStatus.INFLIGHT:
            param.ds_gathering.wait()


def gather(params: Iterable[torch.nn.Parameter]) -> None:
    """Make `params` whole on this rank; a collective of all their ranks."""
    params = list(params)
    start_gather(params)
    finish_gather(params)


def release(params: Iterable[torch.nn.Parameter]) -> None:
    """Go back to the slices; edits of whole values are lost unless written back first."""
    for param in params:
        if param.ds_status is ZeroParamStatus.INFLIGHT:
            param.ds_gathering.wait()
        if param.ds_status is ZeroParamStatus.AVAILABLE:
            param.data = absent(param)
            param.ds_status = ZeroParamStatus.NOT_AVAILABLE


def empty_unless_whole(param: torch.nn.Parameter) -> None:
    """Have a parameter that is not gathered show what it shows between uses."""
    if param.ds_status is ZeroParamStatus.NOT_AVAILABLE:
        param.data = absent(param)


# - the methods that callers know


def _all_gather(
    param: torch.nn.Parameter, param_list: Any = None, async_op: bool = False, hierarchy: int = 0
) -> Any:
    params = [param] if param_list is None else list(param_list)
    start_gather(params)
    if async_op:
        return _Waiter(params)
    finish_gather(params)
    return None


def _all_gather_coalesced(params: Iterable[torch.nn.Parameter], *_: Any, **__: Any) -> _Waiter:
    params = list(params)
    start_gather(params)
    return _Waiter(params)


class _Waiter:
    """What an asynchronous gather returns."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self._params = params

    def wait(self, **_: Any) -> None:
        finish_gather(self._params)


def _partition(
    param: torch.nn.Parameter,
    param_list: Any = None,
    hierarchy: int = 0,
    has_been_updated: bool = False,
    free_data: bool = True,
) -> None:
    params = [param] if param_list is None else list(param_list)
    for each in params:
        if has_been_updated and each.ds_status is ZeroParamStatus.AVAILABLE:
            write_back(each)
    release(params)


def _summary(param: torch.nn.Parameter, *_: Any, **__: Any) -> dict[str, Any]:
    return {
        "id": param.ds_id,
        "status": param.ds_status.name,
        "numel": param.numel(),
        "ds_numel": param.ds_numel,
        "shape": tuple(param.shape),
        "ds_shape": tuple(param.ds_shape),
        "requires_grad": param.requires_grad,
        "grad_shape": None if param.grad is None else tuple(param.grad.shape),
        "persist": param.ds_persist,
        "active_sub_modules": param.ds_active_sub_modules,
        "ds_tensor.shape": tuple(param.ds_tensor.shape),
    }


def _convert_like(param: torch.nn.Parameter, param_list: Iterable[torch.nn.Parameter]) -> None:
    from .tiers import tier_for

    for other in param_list:
        if not is_zero_param(other):
            on_host = param.ds_tensor.device.type == "cpu" and param.ds_device.type != "cpu"
            tier = tier_for(param.ds_device, on_host, True)
            shard_param(other, param.ds_axis, param.ds_device, tier, home=param.ds_home)


def _item(param: torch.nn.Parameter) -> Any:
    """The value of a parameter of one element; a collective of its ranks while it is not whole."""
    whole = param.ds_status is ZeroParamStatus.AVAILABLE
    gather([param])
    value = torch.Tensor.item(param)
    if not whole:
        release([param])
    return value


def _reduced_by_hooks(name: str, *_: Any, **__: Any) -> None:
    raise NotImplementedError(
        explain(
            f"{name} is not for callers",
            expected="gradients reduced by the engine's backward pass",
            fix="call engine.backward(loss), and read gradients by deepspeed.utils.safe_get_full_grad",
        )
    )
