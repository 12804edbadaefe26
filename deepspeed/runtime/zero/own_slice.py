# SPDX-License-Identifier: Apache-2.0
"""The slice of a sharded parameter that this rank keeps: where it lives, and how it gets its values.

It is taken from the whole values or filled by its own elements alone; it lies on a tier or in a file, as it is or encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from .codec import GroupCodec
from .spill import SpilledSlice, SpillFolder
from .tiers import Tier


class ZeroParamType(Enum):
    """How a parameter takes part in sharding."""

    NORMAL = 1
    """Whole on every rank."""
    PARTITIONED = 2
    """Sharded, gathered before use."""
    REMOTE = 3
    """Held by another device."""


class ZeroParamStatus(Enum):
    """Where a sharded parameter's values are."""

    AVAILABLE = 1
    """Gathered: whole on this rank."""
    NOT_AVAILABLE = 2
    """Only this rank's slice is here."""
    INFLIGHT = 3
    """Being gathered."""


def is_zero_param(parameter: Any) -> bool:
    """Whether a parameter is sharded by ZeRO stage 3."""
    return torch.is_tensor(parameter) and hasattr(parameter, "ds_id")


def shape_of(param: torch.Tensor) -> torch.Size:
    """The shape of a parameter when whole."""
    return param.ds_shape if is_zero_param(param) else param.shape


def numel_of(param: torch.Tensor) -> int:
    """The number of elements of a parameter when whole."""
    return param.ds_numel if is_zero_param(param) else param.numel()


def cut(
    param: torch.nn.Parameter, tier: Tier, folder: SpillFolder | None, codec: GroupCodec | None
) -> None:
    """Take a new slice from the whole values."""
    param.ds_codec = codec
    plain = codec is None and not param.ds_packed
    shard = tier.alloc(stored_numel(param), param.dtype if plain else torch.uint8)
    own = _own_of_whole(param)
    shard[: own.numel()].copy_(own)
    if folder is None:
        hold(param, shard)
    else:
        spill(param, folder, shard)


def fill(
    param: torch.nn.Parameter,
    elements: Callable[[int, int, torch.dtype], torch.Tensor],
    whole: Callable[[], torch.Tensor],
) -> None:
    """Give a parameter other values; of a sharded one, which must not be gathered, only this rank's slice is asked for.

    Args:
        param: sharded or whole.
        elements: gives elements from a start, so many, in a dtype, flat.
        whole: gives all values.
    """
    if not is_zero_param(param):
        param.data.copy_(whole())
        return
    if param.ds_codec is not None:  # encoded whole, then cut
        param.data = whole().to(param.ds_device, param.ds_codec.dtype)
        write_back(param)
        param.data = absent(param)
        return
    piece = piece_of(param)
    start = min(param.ds_axis.rank * piece, param.ds_numel)
    values = elements(start, min(piece, param.ds_numel - start), param.dtype)
    if param.ds_packed:
        values = _packed(param, values.to(param.ds_tensor.device))
    _keep(param, values)
    if param.ds_second is not None:
        param.ds_second.ready = False


def _own_of_whole(param: torch.nn.Parameter) -> torch.Tensor:
    """This rank's slice of the whole values, in the form that slices have, without padding."""
    values, piece, rank = param.data.detach(), piece_of(param), param.ds_axis.rank
    values = values.reshape(-1) if param.ds_codec is None else param.ds_codec.encode(values)
    own = values[rank * piece : (rank + 1) * piece]
    return _packed(param, own) if param.ds_packed else own


def _packed(param: torch.nn.Parameter, own: torch.Tensor) -> torch.Tensor:
    """The values of a slice in the form in which they travel."""
    padded = own.new_zeros(piece_of(param))
    padded[: own.numel()] = own
    return param.ds_wire.encode(padded)


def spill(param: torch.nn.Parameter, folder: SpillFolder, shard: torch.Tensor) -> None:
    """Move a parameter's slice into a file."""
    param.ds_spill = SpilledSlice(folder, f"{param.ds_id}_param.tensor.swp", shard)
    hold(param, shard.new_empty(0, device="cpu"))
    param.ds_tensor.ds_numel = shard.numel()
    param.ds_tensor.status = ZeroParamStatus.NOT_AVAILABLE
    param.ds_tensor.final_location = "nvme"


def unspill(param: torch.nn.Parameter, tier: Tier) -> None:
    """Move a parameter's slice out of its file."""
    values = param.ds_spill.take()
    param.ds_spill = None
    shard = tier.alloc(values.numel(), values.dtype)
    hold(param, shard.copy_(values))


def absent(param: torch.nn.Parameter) -> torch.Tensor:
    """What `param.data` is between uses: an empty tensor, or a shell (compile/sharded.py) where graphs expect a shape."""
    shell = getattr(param, "ds_shell", None)
    return torch.empty(0, dtype=param.dtype, device=param.ds_device) if shell is None else shell


def piece_of(param: torch.nn.Parameter) -> int:
    """Elements that one rank's slice stands for (bytes, if the parameter is encoded whole), padding included."""
    total = param.ds_numel if param.ds_codec is None else param.ds_codec.nbytes
    return -(-total // param.ds_axis.size)


def stored_numel(param: torch.nn.Parameter) -> int:
    """Elements of the tensor that is one rank's slice: bytes, if it is encoded."""
    return param.ds_wire.nbytes if param.ds_packed else piece_of(param)


def is_its_slice(param: torch.nn.Parameter) -> bool:
    """Whether this rank's slice is all of the values, as they are, where the parameter is gathered to."""
    return (
        param.ds_axis.size == 1
        and param.ds_codec is None
        and not param.ds_packed
        and param.ds_spill is None
        and param.ds_tensor.device == param.ds_device
    )


def slice_of(param: torch.nn.Parameter) -> torch.Tensor:
    """This rank's slice, flat: the slice itself, or a copy read from its file."""
    return param.ds_tensor if param.ds_spill is None else param.ds_spill.take()


def values_of_slice(param: torch.nn.Parameter) -> torch.Tensor:
    """The values of this rank's slice, flat, whatever form it is kept in (not if the parameter is encoded whole)."""
    data = slice_of(param)
    return param.ds_wire.decode(data) if param.ds_packed else data


def write_back(param: torch.nn.Parameter) -> None:
    """Take this rank's slice from the whole values."""
    own = _own_of_whole(param)
    if param.ds_second is not None:
        param.ds_second.take(param.data)
    _keep(param, own)


def _keep(param: torch.nn.Parameter, own: torch.Tensor) -> None:
    if param.ds_spill is not None:
        param.ds_spill.write(0, own)
    elif own.data_ptr() != param.ds_tensor.data_ptr():
        param.ds_tensor[: own.numel()].copy_(own)


def hold(param: torch.nn.Parameter, shard: torch.Tensor) -> None:
    """Make `shard` the parameter's slice (its values are already right)."""
    shard.ds_numel = shard.numel()
    shard.status = ZeroParamStatus.AVAILABLE
    shard.final_location = None
    shard.ds_quant_scale = None
    param.ds_tensor = shard
