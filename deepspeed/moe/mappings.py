# SPDX-License-Identifier: Apache-2.0
"""Tokens and tensor parallelism: drop all but this rank's share of them, or gather the shares.

Tensor-parallel ranks hold the same tokens; without dropping, each expert would compute each token
once for every such rank. The backward of one mapping is the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import explain


def tensor_parallel_size() -> int:
    """Number of tensor-parallel ranks; 1 without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    from deepspeed.utils import groups

    return int(groups._get_model_parallel_world_size())


def experts_are_spread() -> bool:
    """Whether tensor-parallel ranks hold parts of each expert, so that all of them need all tokens."""
    from deepspeed.utils import groups

    return groups._get_expert_model_parallel_world_size() > 1


def _drop(tokens: Tensor, dim: int) -> Tensor:
    from deepspeed.utils import groups

    size, rank = tensor_parallel_size(), groups._get_model_parallel_rank()
    if tokens.shape[dim] % size:
        raise ValueError(
            explain(
                f"tensor-parallel ranks cannot share dimension {dim} evenly",
                got=f"{tokens.shape[dim]} tokens for {size} ranks",
                fix=f"Pad the tokens to a multiple of {size}.",
            )
        )
    return tokens.chunk(size, dim=dim)[rank].contiguous()


def _gather(tokens: Tensor, dim: int) -> Tensor:
    from deepspeed import comm
    from deepspeed.utils import groups

    tokens = tokens.contiguous()
    shares = [torch.empty_like(tokens) for _ in range(tensor_parallel_size())]
    comm.all_gather(shares, tokens, group=groups._get_model_parallel_group())
    return torch.cat(shares, dim=dim)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return _gather(tokens, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _drop(grad, ctx.dim), None


class _DropTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return _drop(tokens, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.dim), None


def gather_tokens(input_: Tensor, dim: int = 0) -> Tensor:
    """All ranks' shares side by side along `dim`; `input_` itself on one tensor-parallel rank."""
    return input_ if tensor_parallel_size() == 1 else _GatherTokens.apply(input_, dim)


def drop_tokens(input_: Tensor, dim: int = 0) -> Tensor:
    """This rank's share of `input_` along `dim`; `input_` itself on one tensor-parallel rank.

    Raises:
        ValueError: the ranks cannot share `dim` evenly.
    """
    return input_ if tensor_parallel_size() == 1 else _DropTokens.apply(input_, dim)
