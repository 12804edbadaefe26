# SPDX-License-Identifier: Apache-2.0
"""Training state that leaves the device for a while (`engine.offload_states`), so that something else has its memory.

Everything stays readable where it went, and every tensor that shares memory with another one goes on sharing it: whole
storages are copied, and all tensors of the optimizer that point into one are pointed to its copy.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from .plan import TierKind
from .shard_group import ShardGroup, ShardPart
from .tiers import DeviceTier, HostTier, Tier

_ALL = tuple(OffloadStateTypeEnum)


def offload_states(
    optimizer: Any,
    include: Container[OffloadStateTypeEnum] | None = None,
    device: OffloadDeviceEnum | str = OffloadDeviceEnum.cpu,
    pin_memory: bool = True,
    non_blocking: bool = False,
) -> set[OffloadStateTypeEnum]:
    """Move state of a `ZeroOptimizer` to CPU memory; `reload_states` brings it back before the next forward pass.

    Args:
        optimizer: the optimizer, between steps.
        include: which kinds; None is all. What lives in CPU memory anyway stays there.
        device: `cpu`; `none` does nothing.
        pin_memory: page-locked memory, which makes both ways faster.
        non_blocking: return before the copies are done.

    Returns:
        The kinds that are away now.

    Raises:
        ValueError: `nvme`, which would need a place, or an unknown word.
        AssertionError: parameters are offloaded by the configuration already.
    """
    device = OffloadDeviceEnum(device)
    if device is OffloadDeviceEnum.none:
        logger.warning("offload_states: device none leaves everything where it is")
        return set()
    if device is not OffloadDeviceEnum.cpu:
        raise ValueError(
            explain(
                "states can be moved to CPU memory only", got=device.value, expected="cpu or none"
            )
        )
    if optimizer.plan.param_tier is not TierKind.DEVICE:
        raise AssertionError(
            explain(
                "offload_states does not work together with offloaded parameters",
                got=f"offload_param.device in {optimizer.plan.param_tier.value} memory",
                expected="parameters on the device",
            )
        )
    kinds = [kind for kind in _ALL if include is None or kind in include]
    tier = HostTier(pinned=pin_memory and optimizer.device.type == "cuda")
    moved = set()
    optimizer.reducer.before_pass()  # no `.grad` may keep the memory that is given back
    for kind in kinds:
        if kind is OffloadStateTypeEnum.contiguous_grad_buffer:
            _drop_buffers(optimizer)
        tensors = [t for t in tensors_of(optimizer, kind) if _is_away_from(t, tier)]
        if tensors:
            relocate(tensors, tier)
            moved.add(kind)
    optimizer.offloaded_states = _away(optimizer) | moved
    _settle(non_blocking)
    return set(optimizer.offloaded_states)


def reload_states(optimizer: Any, non_blocking: bool = False) -> None:
    """Bring back what `offload_states` has moved; does nothing where nothing is away.

    Args:
        optimizer: the optimizer.
        non_blocking: return before the copies are done; work on the device's current stream comes after them anyway.
    """
    tier = DeviceTier(optimizer.device)
    for kind in _ALL:
        if kind in _away(optimizer):
            relocate([t for t in tensors_of(optimizer, kind) if _is_away_from(t, tier)], tier)
    optimizer.offloaded_states = set()
    _settle(non_blocking)


def refuse_use(optimizer: Any) -> None:
    """Called before a forward pass while states are away.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        explain(
            "states are offloaded",
            got=", ".join(sorted(kind.value for kind in _away(optimizer))),
            expected="all of them on the device",
            fix="call engine.reload_states() before the forward pass",
        )
    )


def get_state_devices(model: Any, state: OffloadStateTypeEnum) -> set[torch.device]:
    """Where one kind of state is at the moment; what lives in files is nowhere.

    Args:
        model: an engine, or its optimizer.
        state: the kind.
    """
    optimizer = model if hasattr(model, "plan") and hasattr(model, "reducer") else model.optimizer
    kind = OffloadStateTypeEnum(state)
    return {tensor.device for tensor in tensors_of(optimizer, kind, everywhere=True)}


def tensors_of(
    optimizer: Any, kind: OffloadStateTypeEnum, *, everywhere: bool = False
) -> list[torch.Tensor]:
    """The tensors of one kind, each once, views included: those on the device by configuration, or all in memory."""
    found: list[torch.Tensor | None] = []
    for group in optimizer.groups:
        parts = [p for p in group.parts if p.spilled is None]
        if not everywhere:
            parts = [p for p in parts if _on_device(p, optimizer.device)]
        if kind is OffloadStateTypeEnum.lp_params:
            found += _param_tensors(group)
            found += [p.low for p in group.parts]
            found += [p.master for p in parts if _aliases(group, p)]
        elif kind is OffloadStateTypeEnum.hp_params:
            found += [p.master for p in parts if not _aliases(group, p)]
        elif kind is OffloadStateTypeEnum.optim_states:
            states = (optimizer.state.get(p.master, {}).values() for p in parts)
            # Numbers of steps stay: they are one element, and optimizers keep them where they like.
            found += [v for some in states for v in some if torch.is_tensor(v) and v.dim() > 0]
        elif kind is OffloadStateTypeEnum.lp_grads:
            found += [p.grad for p in parts]
            found += [param.grad for param in group.params]
    present = [t for t in found if t is not None and t.untyped_storage().nbytes()]
    return list({id(t): t for t in present}.values())


def relocate(tensors: Iterable[torch.Tensor], tier: Tier) -> None:
    """Copy the storages behind `tensors` to `tier`, and point the tensors there.

    Tensors outside the list that share a storage keep the old one.
    """
    homes: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in homes:
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            copy = tier.alloc(storage.nbytes(), torch.uint8)
            copy.copy_(whole, non_blocking=True)
            homes[key] = (
                storage,
                copy,
            )  # the old storage stays until all are moved: its address is the key
        there = homes[key][1]
        place = torch.empty(0, dtype=tensor.dtype, device=there.device)
        tensor.data = place.set_(
            there.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )


# - helpers


def _param_tensors(group: ShardGroup) -> list[torch.Tensor | None]:
    """Everything that points into a group's parameters: the slab and its views, or the slices of sharded ones."""
    if group.param_slab is None:
        slices = [getattr(param, "ds_tensor", None) for param in group.params]
        seconds = [getattr(param, "ds_secondary_tensor", None) for param in group.params]
        # whole params, too: small ones stay gathered
        return [group.own, *slices, *seconds, *group.params]
    slab = group.param_slab
    views = [slab.view(index) for index in range(len(group.params))]
    return [slab.flat, *views, group.own, *group.params]


def _aliases(group: ShardGroup, part: ShardPart) -> bool:
    """Whether a part's masters are the parameters themselves."""
    return part.low is None and group.own is not None


def _on_device(part: ShardPart, device: torch.device) -> bool:
    return part.tier.device.type == device.type


def _is_away_from(tensor: torch.Tensor, tier: Tier) -> bool:
    return tensor.device.type != tier.device.type


def _away(optimizer: Any) -> set[OffloadStateTypeEnum]:
    return getattr(optimizer, "offloaded_states", set())


def _drop_buffers(optimizer: Any) -> None:
    """Buckets make their buffers anew when the next gradients come."""
    for bucket in optimizer.reducer._buckets:
        if not bucket.arrived or bucket.launched:
            bucket.buffer = None
    optimizer.reducer.blocks.clear()


def _settle(non_blocking: bool) -> None:
    if not non_blocking:
        get_accelerator().synchronize()
    get_accelerator().empty_cache()
