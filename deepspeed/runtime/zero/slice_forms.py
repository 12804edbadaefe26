# SPDX-License-Identifier: Apache-2.0
"""Other forms for sharded parameters: cut over other ranks, encoded at rest or on the way, with a second copy."""

from __future__ import annotations

import torch

from deepspeed.comm.mesh import Axis

from .codec import GroupCodec, SliceCodec
from .own_slice import cut, hold, piece_of, slice_of, spill
from .second_copy import SecondCopy
from .sharded_param import describe, gather, release
from .spill import SpillFolder
from .tiers import Tier


def recode(param: torch.nn.Parameter, tier: Tier, codec: GroupCodec | None) -> None:
    """Hold a sharded parameter's slice with another codec, where it is; a collective of all its ranks."""
    if param.ds_codec == codec:
        return
    gather([param])
    param.ds_wire, param.ds_packed = None, False
    cut(param, tier, None if param.ds_spill is None else param.ds_spill.folder, codec)
    release([param])


def move_to_axis(
    param: torch.nn.Parameter, axis: Axis, home: Axis, tier: Tier, folder: SpillFolder | None
) -> None:
    """Cut a sharded parameter over other ranks; a collective of those that it was cut over."""
    if param.ds_axis == axis and param.ds_home == home:
        param.ds_axis, param.ds_home = axis, home  # equal ones may differ in their hops
        return
    codec = param.ds_codec
    gather([param])
    describe(param, axis, param.ds_device, home)
    cut(param, tier, folder, codec)
    param.data = torch.empty(0, dtype=param.dtype, device=param.ds_device)


def send_quantized(param: torch.nn.Parameter) -> None:
    """Have gathers of a sharded parameter carry 8-bit codes (qwZ); vectors and encoded parameters go as they are."""
    if len(param.ds_shape) > 1 and param.is_floating_point() and param.ds_codec is None:
        param.ds_wire = SliceCodec(piece_of(param), param.dtype)


def keep_quantized(param: torch.nn.Parameter, tier: Tier) -> None:
    """Keep this rank's slice of a frozen matrix as 8-bit codes; no collective."""
    if param.ds_packed or param.ds_codec is not None or not param.is_floating_point():
        return
    if len(param.ds_shape) < 2 or not param.ds_numel:
        return
    values = slice_of(param)
    param.ds_wire = SliceCodec(piece_of(param), param.dtype)
    param.ds_packed = True
    codes = param.ds_wire.encode(values)
    if param.ds_spill is not None:
        spill(param, param.ds_spill.folder, codes)
    else:
        shard = tier.alloc(codes.numel(), torch.uint8)
        hold(param, shard.copy_(codes))


def keep_second(param: torch.nn.Parameter, axis: Axis) -> None:
    """Share a second copy of a sharded parameter with the neighbours of `axis`; see [Note: Second copy] in second_copy.py."""
    if axis.size == param.ds_axis.size or not param.ds_numel:
        return
    part = torch.zeros(-(-param.ds_numel // axis.size), dtype=param.dtype, device=param.ds_device)
    param.ds_second = SecondCopy(axis, part)
    param.ds_secondary_tensor, param.ds_secondary_tensor_group_size = part, axis.size
    param.ds_secondary_tensor_num_of_groups = param.ds_axis.size // axis.size
    param.ds_zero_param_process_group = axis.group
