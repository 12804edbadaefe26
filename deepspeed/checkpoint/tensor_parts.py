# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel rank's part of a whole state, by what a divided layer wrote down on its parameters.

The dict that such a parameter carries is described where layers make it (`module_inject.tp_metadata`). Parameters of
models that divide themselves carry none; their parts follow from the saved state alone (`universal_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..utils.errors import explain
from .constants import DS_AUTOTP_UC_META, UNIVERSAL_CHECKPOINT_VERSION_KEY

# From this version on, uneven parts of joined weights are written down.
_WITH_WIDTHS = 0.4


def _get_param_uc_restore_meta(param: torch.Tensor) -> Mapping[str, Any] | None:
    """What a parameter says of how it was cut; None if it does not."""
    return getattr(param, DS_AUTOTP_UC_META, None)


def _resolve_autotp_partition(
    current_param: torch.Tensor,
    ckpt_dict: Mapping[str, Any],
    full_hp_param: torch.Tensor,
    tp_rank: int,
    tp_world_size: int,
) -> torch.Tensor | None:
    """A parameter's part of a whole state, flat; None for a parameter that does not say how it was cut.

    Args:
        current_param: the parameter.
        ckpt_dict: unused: the parameter knows more than the saved state.
        full_hp_param: the whole state, flat or in its shape.
        tp_rank, tp_world_size: this rank among those that share the layer.

    Raises:
        RuntimeError: the layer's parts cannot be told from one another.
        AssertionError: parts are uneven, and nobody wrote down how.
    """
    meta = _get_param_uc_restore_meta(current_param)
    return None if meta is None else part_of(meta, full_hp_param, tp_rank, tp_world_size)


def part_of(
    meta: Mapping[str, Any], whole: torch.Tensor, tp_rank: int, tp_world_size: int
) -> torch.Tensor:
    """One rank's part of a whole state, flat, by a parameter's `meta`; see `_resolve_autotp_partition`."""
    reason = (meta.get("conversion") or {}).get("unsupported_reason")
    if reason:
        raise RuntimeError(
            explain("a parameter's part cannot be told from the whole", got=str(reason))
        )
    if meta.get("logical_shape") is not None:
        whole = whole.reshape(meta["logical_shape"])
    dim = meta.get("partition_dim")
    if meta.get("replicated") or dim is None:
        return whole.flatten()
    if (sizes := _joined_sizes(meta, whole.shape[dim])) is not None:
        return _narrow_sub_params(
            whole,
            dim,
            sizes,
            meta.get("sub_param_shard_widths"),
            tp_rank,
            tp_world_size,
            meta.get(UNIVERSAL_CHECKPOINT_VERSION_KEY),
        )
    parts = meta.get("partition_sizes")
    if parts is None:
        size = whole.shape[dim]
        if size % tp_world_size:
            raise AssertionError(
                explain(
                    "a parameter is divided unevenly and its layer records no partition_sizes",
                    got=f"{size} elements over {tp_world_size} ranks",
                )
            )
        parts = [size // tp_world_size] * tp_world_size
    return whole.narrow(dim, sum(parts[:tp_rank]), parts[tp_rank]).flatten()


def _joined_sizes(meta: Mapping[str, Any], total: int) -> Sequence[int] | None:
    """The sizes of weights that are joined in a parameter; None for a single one."""
    if meta.get("sub_param_sizes") is not None:
        return list(meta["sub_param_sizes"])
    shape = meta.get("sub_param_shape")
    if shape is None:
        return None
    entry = shape[meta["partition_dim"]]
    if isinstance(entry, (tuple, list)):
        return list(entry)
    return [total // int(entry)] * int(entry)


def _narrow_sub_params(
    full_view: torch.Tensor,
    partition_dim: int,
    sub_param_sizes: Sequence[int],
    sub_param_shard_widths: Sequence[Sequence[int]] | None,
    tp_rank: int,
    tp_world_size: int,
    version: float | None = None,
) -> torch.Tensor:
    """One rank's part of joined weights, flat.

    Args:
        full_view: the whole.
        partition_dim: the divided dimension.
        sub_param_sizes: size of each of them along it.
        sub_param_shard_widths: of each, what each rank has; None divides evenly.
        tp_rank, tp_world_size: whose part.
        version: of what was written down; from 0.4 on the widths must be there.

    Raises:
        AssertionError: without widths, they do not divide evenly, or the version has to have them.
    """
    widths = checked_widths(sub_param_sizes, sub_param_shard_widths, tp_world_size, version)
    parts = [
        one.narrow(partition_dim, sum(per_rank[:tp_rank]), per_rank[tp_rank])
        for one, per_rank in zip(
            full_view.split(list(sub_param_sizes), partition_dim), widths, strict=True
        )
    ]
    return torch.cat(parts, partition_dim).flatten()


def checked_widths(
    sizes: Sequence[int],
    widths: Sequence[Sequence[int]] | None,
    ranks: int,
    version: float | None = None,
) -> list[list[int]]:
    """What each rank has of each of several joined weights; see `_narrow_sub_params`."""
    if widths is not None:
        return [[int(n) for n in per_rank] for per_rank in widths]
    if version is not None and float(version) >= _WITH_WIDTHS:
        raise AssertionError(
            explain(
                "a description of joined weights records no sub_param_shard_widths",
                got=f"version {version}",
                expected="them, from version 0.4 on",
            )
        )
    if any(size % ranks for size in sizes):
        raise AssertionError(
            explain(
                "the sizes of joined weights are not divisible by tp_world_size, and no widths are recorded",
                got=f"{list(sizes)} over {ranks} ranks",
            )
        )
    return [[size // ranks] * ranks for size in sizes]
