# SPDX-License-Identifier: Apache-2.0
"""Optimizer states that stay in the memory which a checkpoint was read into, so that nothing is copied.

Their memory is needed anyway, and filling it straight from the disk touches it once: to zero new memory and copy into it
takes longer than the transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from deepspeed.checkpoint.reshard import SavedState, Slot

if TYPE_CHECKING:
    from .optimizer import ZeroOptimizer
    from .shard_group import ShardGroup


def lent_states(
    optimizer: ZeroOptimizer, group: ShardGroup, saved: SavedState, keys: Iterable[str]
) -> dict[int, dict[str, torch.Tensor]]:
    """By the identity of a part: its states, where the very memory of the saved ones can become that of the part."""
    runs: dict[int, tuple[Slot, int, int]] = {}  # slot, where the part begins in it, elements
    for segment in group.layout.segments(group.shard_axis.rank):
        name = optimizer.param_names[group.params[segment.param]]
        for part, offset, within, length in group.runs(segment.shard_start, segment.length):
            for shift, slot, start, run in saved.runs(name, segment.param_start + offset, length):
                begin = start - within - shift
                known, known_begin, filled = runs.get(id(part), (slot, begin, 0))
                in_a_row = known is slot and known_begin == begin and filled == within + shift
                runs[id(part)] = (slot, begin, filled + run if in_a_row else -1)
    lent = {}
    for part in group.parts:
        slot, begin, filled = runs.get(id(part), (None, 0, 0))
        padding = group.padding if part is group.parts[-1] else 0
        if slot is None or not slot.is_lent or not 0 <= part.length - filled <= padding:
            continue
        if part.spilled is not None or not part.master.is_cpu or _is_pinned(part.master):
            continue
        # groups that were cut otherwise when they were saved: the next parameter's states are where padding would be
        if not saved.is_padding(slot, begin + filled, part.length - filled):
            continue
        found = {key: slot.tensors[key][begin:] for key in keys if key in slot.tensors}
        if all(flat.numel() >= part.length for flat in found.values()):
            lent[id(part)] = {key: flat[: part.length] for key, flat in found.items()}
            for flat in found.values():
                flat[filled : part.length].zero_()
    return lent


def dtypes_of(state: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """The dtypes of a state's tensors."""
    return {key: value.dtype for key, value in state.items() if isinstance(value, torch.Tensor)}


def _is_pinned(tensor: torch.Tensor) -> bool:
    # to ask would start CUDA; before that nothing can be
    return torch.cuda.is_initialized() and tensor.is_pinned()
