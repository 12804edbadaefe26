# SPDX-License-Identifier: Apache-2.0
"""Layers that look at each position alone, computed a tile of the sequence at a time.

An MLP or a language-model head needs memory by the length of the sequence times its widest layer. Run over tiles, and
once more for their gradients, it needs that of one tile (Arctic Long Sequence Training, arXiv:2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import explain


@dataclass(frozen=True)
class _Tiling:
    """How a computation is cut.

    Attributes:
        run: takes one tile of each sharded value.
        dim: dimension of the values that is cut.
        sizes: length of each tile.
        params: parameters that get gradients; their hooks must see the last tile's only.
        joined: dimension along which results are joined, or None for losses.
        mean: whether losses are averaged over positions, or added.
    """

    run: Callable[..., Tensor]
    dim: int
    sizes: tuple[int, ...]
    params: tuple[torch.nn.Parameter, ...]
    joined: int | None
    mean: bool

    def tiles(self, value: Any) -> list[Any]:
        """One entry a tile; what is no tensor goes to all of them."""
        if not torch.is_tensor(value):
            return [value] * len(self.sizes)
        return list(value.split(list(self.sizes), self.dim))

    def weight(self, index: int) -> float:
        """What the loss of tile `index` counts."""
        return self.sizes[index] / sum(self.sizes) if self.mean else 1.0


class _Tiled(torch.autograd.Function):
    """A computation in tiles: forward without a graph, backward tile by tile with one."""

    @staticmethod
    def forward(ctx: Any, tiling: _Tiling, grad_index: int, *values: Any) -> Tensor:
        ctx.tiling, ctx.grad_index = tiling, grad_index
        ctx.is_tensor = [torch.is_tensor(value) for value in values]
        ctx.others = [None if torch.is_tensor(value) else value for value in values]
        ctx.save_for_backward(*(value for value in values if torch.is_tensor(value)))
        cut = [tiling.tiles(value) for value in values]
        with torch.no_grad():
            results = [tiling.run(*tile) for tile in zip(*cut, strict=True)]
        if tiling.joined is not None:
            return torch.cat(results, tiling.joined)
        shares = [result.double() * tiling.weight(index) for index, result in enumerate(results)]
        return torch.stack(shares).sum(0).to(results[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tiling, saved = ctx.tiling, iter(ctx.saved_tensors)
        values = [
            next(saved) if is_tensor else other
            for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        watched = values[ctx.grad_index]
        gradient = torch.empty_like(watched) if watched.requires_grad else None
        into = None if gradient is None else tiling.tiles(gradient)
        cut = [tiling.tiles(value) for value in values]
        last = len(tiling.sizes) - 1
        begins = [sum(tiling.sizes[:index]) for index in range(last + 1)]
        lost: Any = 0.0
        try:
            for index, tile in enumerate(zip(*cut, strict=True)):
                _set_ready(tiling.params, index == last)
                inputs = list(tile)
                leaf = inputs[ctx.grad_index].detach().requires_grad_(gradient is not None)
                inputs[ctx.grad_index] = leaf
                with torch.enable_grad():
                    result = tiling.run(*inputs)
                if tiling.joined is None:
                    # A 16-bit share is rounded; what it loses goes to the next tile, so that no loss adds up.
                    share = grads[0].double() * tiling.weight(index) + lost
                    incoming = share.to(result.dtype)
                    lost = share - incoming.double()
                else:
                    incoming = grads[0].narrow(tiling.joined, begins[index], tiling.sizes[index])
                if result.requires_grad:
                    torch.autograd.backward(result, incoming.to(result.dtype))
                if into is not None:
                    into[index].copy_(leaf.grad) if leaf.grad is not None else into[index].zero_()
        finally:
            _set_ready(tiling.params, True)
        back: list[Any] = [None] * len(values)
        back[ctx.grad_index] = gradient
        return None, None, *back


def _set_ready(params: Sequence[torch.nn.Parameter], ready: bool) -> None:
    """Tell ZeRO's hooks whether the gradient to come is the last instalment."""
    for param in params:
        param.ds_grad_is_ready = ready


def _sizes(length: int, shards: int) -> tuple[int, ...]:
    if shards < 1 or length < 1:
        raise ValueError(
            explain(
                "a sequence cannot be cut into tiles",
                got=f"length {length}, shards {shards}",
                expected="at least 1 of each",
            )
        )
    step = -(-length // shards)
    return tuple(min(step, length - at) for at in range(0, length, step))


def sequence_tiled_compute(
    fn: Callable[..., Tensor],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, Any],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str,
    compute_params: Sequence[torch.nn.Parameter] | None = None,
    output_unshard_dimension: int = 1,
    output_reduction: str | None = "mean",
) -> Tensor:
    """Run `fn` over tiles of the sequence.

    Args:
        fn: called with keyword arguments; returns a tensor with the sequence in `output_unshard_dimension`, or a loss.
        seqlen: length of dimension 1 of the sharded arguments.
        shards: number of tiles; the last one may be shorter.
        kwargs_to_shard: arguments that are cut, `[batch, sequence, ...]`.
        kwargs_to_pass: arguments that every tile gets whole; no gradient flows to them.
        grad_requiring_tensor_key: the sharded argument whose gradient is wanted.
        compute_params: parameters that `fn` uses.
        output_unshard_dimension: where results are joined; 0 for losses.
        output_reduction: "mean" over positions or "sum" of the losses; not used for joined results.

    Returns:
        The joined results, or the loss as a scalar.
    """
    keys_to_shard, keys_to_pass = list(kwargs_to_shard), list(kwargs_to_pass)
    return SequenceTiledCompute.apply(
        fn,
        seqlen,
        shards,
        keys_to_shard,
        keys_to_pass,
        grad_requiring_tensor_key,
        compute_params,
        output_unshard_dimension,
        output_reduction,
        *(kwargs_to_shard[key] for key in keys_to_shard),
        *(kwargs_to_pass[key] for key in keys_to_pass),
    )


class SequenceTiledCompute:
    """`sequence_tiled_compute` with the values after the names."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        seqlen: int,
        shards: int,
        keys_to_shard: Sequence[str],
        keys_to_pass: Sequence[str],
        grad_requiring_tensor_key: str,
        compute_params: Sequence[torch.nn.Parameter] | None,
        output_unshard_dimension: int,
        output_reduction: str | None,
        *args: Any,
    ) -> Tensor:
        """See `sequence_tiled_compute`.

        Raises:
            ValueError: the tensor that wants a gradient is not among the sharded ones, a sharded tensor has another
                length, or the reduction is unknown.
        """
        if grad_requiring_tensor_key not in keys_to_shard:
            raise ValueError(
                explain(
                    "the tensor that wants a gradient must be one that is cut",
                    got=grad_requiring_tensor_key,
                    expected=f"one of {list(keys_to_shard)}",
                )
            )
        sharded, passed = args[: len(keys_to_shard)], args[len(keys_to_shard) :]
        for key, value in zip(keys_to_shard, sharded, strict=True):
            if torch.is_tensor(value) and (value.dim() < 2 or value.shape[1] != seqlen):
                raise ValueError(
                    explain(
                        f"'{key}' cannot be cut along the sequence",
                        got=f"shape {tuple(value.shape)}",
                        expected=f"[batch, {seqlen}, ...]",
                    )
                )
        same = dict(zip(keys_to_pass, passed, strict=True))

        def run(*tile: Any) -> Tensor:
            return fn(**dict(zip(keys_to_shard, tile, strict=True)), **same)

        tiling = _Tiling(
            run,
            1,
            _sizes(seqlen, shards),
            tuple(compute_params or ()),
            output_unshard_dimension or None,
            output_unshard_dimension == 0 and _is_mean(output_reduction),
        )
        return _run(tiling, list(keys_to_shard).index(grad_requiring_tensor_key), list(sharded))


class TiledMLP:
    """An MLP over tiles of `[batch, sequence, hidden]` or `[sequence, hidden]`."""

    @staticmethod
    def apply(
        fn: Callable[[Any, Tensor], Tensor],
        self: Any,
        x: Tensor,
        shards: int,
        compute_params: Sequence[torch.nn.Parameter] | None = None,
    ) -> Tensor:
        """`fn(self, x)` in `shards` tiles; `compute_params` are the parameters that it uses."""
        dim = x.dim() - 2
        tiling = _Tiling(
            lambda tile: fn(self, tile),
            dim,
            _sizes(x.shape[dim], shards),
            tuple(compute_params or ()),
            dim,
            False,
        )
        return _run(tiling, 0, [x])


class TiledFusedLogitsLoss:
    """Logits and their loss over tiles of the positions, so that no more than a tile's logits are ever there."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        self: Any,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        shards: int,
        compute_params: Sequence[torch.nn.Parameter] | None = None,
        output_reduction: str = "mean",
    ) -> Tensor:
        """The loss of all positions.

        Args:
            fn: `fn(self, x, y)`, or `fn(self, x, y, mask)` where a mask is given; gets `[positions, hidden]` and
                `[positions]`, returns a scalar.
            self: whatever `fn` wants first.
            x: `[batch, sequence, hidden]`.
            y: `[batch, sequence]`.
            mask: `[batch, sequence]` or None.
            shards: number of tiles.
            compute_params: parameters that `fn` uses.
            output_reduction: "mean" over positions, or "sum", of the tiles' losses.

        Raises:
            ValueError: the reduction is unknown.
        """
        given = [x.flatten(0, -2), y.flatten()] + ([] if mask is None else [mask.flatten()])
        tiling = _Tiling(
            lambda *tile: fn(self, *tile),
            0,
            _sizes(len(given[1]), shards),
            tuple(compute_params or ()),
            None,
            _is_mean(output_reduction),
        )
        return _run(tiling, 0, given)


class AutogradComputeMLP(torch.autograd.Function):
    """`fn(self, x)`, run again for its gradients: one tile that is the entire sequence."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[[Any, Tensor], Tensor], self: Any, x: Tensor) -> Tensor:
        ctx.fn, ctx.self = fn, self
        ctx.save_for_backward(x)
        with torch.no_grad():
            return fn(self, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None]:
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.fn(ctx.self, leaf)
        torch.autograd.backward(result, grads[0])
        return None, None, leaf.grad


def _run(tiling: _Tiling, grad_index: int, values: list[Any]) -> Tensor:
    wanted = any(param.requires_grad for param in tiling.params)
    if torch.is_grad_enabled() and wanted and not values[grad_index].requires_grad:
        # Autograd asks for the parameters' gradients only by way of an input that wants one.
        values[grad_index] = values[grad_index].detach().requires_grad_()
    return _Tiled.apply(tiling, grad_index, *values)


def _is_mean(reduction: str | None) -> bool:
    if reduction not in ("mean", "sum"):
        raise ValueError(
            explain("unknown reduction", got=repr(reduction), expected="'mean' or 'sum'")
        )
    return reduction == "mean"
