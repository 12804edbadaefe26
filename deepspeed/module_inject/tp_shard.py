# SPDX-License-Identifier: Apache-2.0
"""How a dimension is divided over tensor-parallel ranks: whole heads, whole grains, and the rest as evenly as it goes.

What a model asks for (its key-value heads, its grain) is kept for the process, as the layers of one model are made one
after another; a layer remembers the sizes that it was cut to.
"""

from __future__ import annotations

from typing import Any

from deepspeed import comm as dist
from deepspeed.sequence.layer import shares
from deepspeed.utils.errors import explain

num_kv_heads: int | None = None
"""Key-value heads of the model that is being divided; None where heads do not matter."""

n_embd: int | None = None
"""Width of the model that is being divided."""

tp_grain_size: int = 1
"""Sizes of shards are multiples of this, but for the end of a dimension."""

# Layers that have nothing to do with heads, though their size may be a multiple of them.
_HEADLESS_ENDS = ("lm_head", "embed_out")
_HEADLESS_PART = "mlp"


def set_num_kv_heads(num: int | None) -> None:
    """Divide attention between whole key-value heads from here on; None forgets them."""
    global num_kv_heads
    num_kv_heads = num


def get_num_kv_heads() -> int | None:
    """Return the number of key-value heads that is in force."""
    return num_kv_heads


def set_n_embd(num: int | None) -> None:
    """Say how wide the model is."""
    global n_embd
    n_embd = num


def get_n_embd() -> int | None:
    """Return the width of the model."""
    return n_embd


def set_tp_grain_size(num: int) -> None:
    """Divide dimensions without heads at multiples of ``num`` from here on."""
    global tp_grain_size
    tp_grain_size = num


def get_shard_size_list(
    total_size: int, mp_size: int, name: str | None = None, num_kv_heads: int | None = None
) -> list[int]:
    """Divide a dimension.

    Args:
        total_size: its elements.
        mp_size: number of ranks.
        name: of the layer; those of an MLP and language-model heads are not divided by heads.
        num_kv_heads: key-value heads; None takes the number in force.

    Returns:
        Elements of each rank; their sum is ``total_size``. With fewer heads than ranks the last ranks have none.

    Example:
        >>> get_shard_size_list(101, 2)
        [51, 50]
    """
    heads = get_num_kv_heads() if num_kv_heads is None else num_kv_heads
    if heads and total_size % heads == 0 and _has_heads(name):
        return [share * (total_size // heads) for share in shares(heads, mp_size)]
    grain = max(1, tp_grain_size)
    if total_size // grain < mp_size:
        return shares(total_size, mp_size)
    sizes = [share * grain for share in shares(total_size // grain, mp_size)]
    sizes[-1] += total_size % grain
    return sizes


def get_shard_size(
    total_size: int,
    mp_size: int,
    name: str | None = None,
    rank: int | None = None,
    mp_group: Any = None,
    num_kv_heads: int | None = None,
) -> int:
    """Return one rank's elements of a divided dimension.

    Args:
        total_size, mp_size, name, num_kv_heads: as in `get_shard_size_list`.
        rank: index among the ``mp_size`` ranks; None finds this process's in ``mp_group``.
        mp_group: the tensor-parallel process group.

    Raises:
        ValueError: neither is given, and the job has more ranks than ``mp_size``.
    """
    if rank is None:
        if mp_group is None and mp_size != dist.get_world_size():
            raise ValueError(
                explain(
                    "whose shard it is cannot be told: pass a group-local rank or process group",
                    got=f"mp_size {mp_size} in a job of {dist.get_world_size()} processes",
                    expected="rank= or mp_group=",
                )
            )
        rank = dist.get_rank(group=mp_group)
    return get_shard_size_list(total_size, mp_size, name, num_kv_heads)[rank]


def _has_heads(name: str | None) -> bool:
    text = str(name)
    return _HEADLESS_PART not in text and text.rsplit(".", 1)[-1] not in _HEADLESS_ENDS
