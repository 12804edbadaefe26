# SPDX-License-Identifier: Apache-2.0
"""Position biases by heads (ALiBi, arXiv:2108.12409) for models whose heads are divided over ranks."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepspeed.utils import groups

from .tp_shard import get_shard_size_list

_ORIGINAL = "_ds_original_"


def _own(
    per_head: torch.Tensor, sizes: Sequence[int] | None = None, rank: int | None = None
) -> torch.Tensor:
    """A rank's heads of something whose first dimension is all heads; None is this process in the present groups."""
    rank = groups.get_tensor_model_parallel_rank() if rank is None else rank
    if sizes is None:
        world = groups.get_tensor_model_parallel_world_size()
        sizes = get_shard_size_list(per_head.shape[0], world)
    return per_head.narrow(0, sum(sizes[:rank]), sizes[rank])


def build_bloom_alibi_tensor(
    attention_mask: torch.Tensor,
    num_heads: int,
    dtype: torch.dtype,
    head_shard_sizes: Sequence[int] | None = None,
    total_num_heads: int | None = None,
    rank: int | None = None,
) -> torch.Tensor:
    """Make BLOOM's biases of this rank's heads.

    Args:
        attention_mask: (batch, length), 1 where there is a token.
        num_heads: all heads, or this rank's if `total_num_heads` is given.
        dtype: of the result.
        head_shard_sizes: heads of each rank.
        total_num_heads: all heads.
        rank: whose heads; None takes this process's place in the groups that are there now.

    Returns:
        Shape (batch * own heads, 1, length).
    """
    heads = total_num_heads or num_heads
    slopes = torch.tensor(_slopes(heads), dtype=torch.float32, device=attention_mask.device)
    places = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    own = _own(slopes, head_shard_sizes, rank)[None, :, None] * places
    return own.reshape(-1, 1, attention_mask.shape[1]).to(dtype)


def _slopes(heads: int) -> list[float]:
    """A geometric row for a power of two, and every second one of the next row for the rest."""
    near = 2 ** (heads.bit_length() - 1)
    first = [2 ** (-8 * (i + 1) / near) for i in range(near)]
    second = [2 ** (-4 * (2 * i + 1) / near) for i in range(heads - near)]
    return first + second


def get_alibi_mask(
    self: Any,
    tensor: Any,
    seq_length_with_past: int,
    head_shard_sizes: Sequence[int] | None = None,
    total_num_heads: int | None = None,
    rank: int | None = None,
) -> torch.Tensor:
    """Baichuan's mask of this rank's heads: the model's own, made for all heads, and cut."""
    held = self.n_head
    try:
        self.n_head = total_num_heads or held
        whole = _original(self, "get_alibi_mask")(tensor, seq_length_with_past)
    finally:
        self.n_head = held
    return _own(whole, head_shard_sizes, rank)


def build_mpt_alibi_tensor(
    self: Any,
    num_heads: int,
    sequence_length: int,
    alibi_bias_max: int = 8,
    device: Any = None,
    head_shard_sizes: Sequence[int] | None = None,
    total_num_heads: int | None = None,
    rank: int | None = None,
) -> torch.Tensor:
    """MPT's biases of this rank's heads: the model's own, made for all heads, and cut."""
    make = _original(self, "build_mpt_alibi_tensor")
    heads = total_num_heads or num_heads
    whole = make(heads, sequence_length, alibi_bias_max=alibi_bias_max, device=device)
    return _own(whole, head_shard_sizes, rank)


def install_head_sharded_helper(
    module: Any,
    name: str,
    helper: Callable[..., Any],
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
) -> None:
    """Have one object's method give this rank's heads only; its class stays as it is.

    Args:
        module: the object.
        name: of the method.
        helper: takes the object and the method's arguments, and `head_shard_sizes` and `total_num_heads`.
        num_heads: all heads; with it their division is fixed here, and later models do not change it.
        num_kv_heads: key-value heads that they are divided by; None takes those in force.
    """
    if _ORIGINAL + name not in vars(module):
        object.__setattr__(module, _ORIGINAL + name, getattr(module, name))
    fixed: dict[str, Any] = {}
    if num_heads is not None:
        world = groups.get_tensor_model_parallel_world_size()
        sizes = get_shard_size_list(num_heads, world, num_kv_heads=num_kv_heads)
        fixed = {"head_shard_sizes": sizes, "total_num_heads": num_heads}

    def of_own_heads(self: Any, *args: Any, **kwargs: Any) -> Any:
        return helper(self, *args, **kwargs, **fixed)

    object.__setattr__(module, name, types.MethodType(of_own_heads, module))


def _original(module: Any, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(module, _ORIGINAL + name)
    return found
