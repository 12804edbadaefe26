# SPDX-License-Identifier: Apache-2.0
"""A causal language model as a program over packed weights and a cache that never moves.

One prompt goes through `prefill`, then one token a sequence through `step`. Keys and values are written into slabs of
fixed size. On a GPU the step can be captured once and replayed: it reads its input from fixed places and attends to
the whole slab behind a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deepspeed.accelerator import get_accelerator

from .weights import DecoderWeights, Layer

_GRAIN = 64  # capacities are multiples of it: few different sizes, few captures


class Cache:
    """Keys and values of all layers, and which of their places hold a token to attend to.

    Args:
        weights: of the model.
        batch: sequences.
        capacity: places of each.
        like: tensor whose dtype and device the slabs get.
    """

    def __init__(self, weights: DecoderWeights, batch: int, capacity: int, like: Tensor) -> None:
        shape = (2, len(weights.layers), batch, weights.kv_heads, capacity, weights.head_dim)
        # a place that was never written is masked, and 0 * NaN would still be NaN
        self.keys, self.values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.allowed = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool, device=like.device)
        self.length = 0
        self.capacity = capacity
        self.padded = False

    def reset(self) -> None:
        """Forget every token."""
        self.allowed.zero_()
        self.length, self.padded = 0, False


class Decoder:
    """Runs a model's decoder program.

    Args:
        weights: packed weights of the model.
        graphs: capture the step on the accelerator, and replay it.
    """

    def __init__(self, weights: DecoderWeights, graphs: bool = False) -> None:
        self.weights = weights
        self.graphs = graphs
        self.cache: Cache | None = None
        self._tables: tuple[Tensor, Tensor] | None = None
        self._graph: Any = None
        self._ids = self._at = self._positions = self._logits = None

    # - the cache

    def prepare(self, batch: int, length: int) -> Cache:
        """An empty cache with room for `length` tokens of `batch` sequences; a fitting one is used again."""
        need = -(-length // _GRAIN) * _GRAIN
        cache, like = self.cache, self.weights.layers[0].qkv.weight
        fits = cache is not None and cache.keys.shape[1] == batch and cache.capacity >= need
        if fits and cache is not None and cache.keys.device == like.device:
            cache.reset()
            return cache
        self._graph = None
        self.cache = cache = Cache(self.weights, batch, need, like)
        if self.weights.rotate is not None:
            self._tables = self.weights.rotate(torch.arange(need, device=like.device))
        return cache

    def release(self) -> None:
        """Free the cache and what was captured on it."""
        self.cache = self._tables = self._graph = self._logits = None

    # - one pass

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run a prompt.

        Args:
            ids: integers, `[batch, tokens]`.
            mask: of the same shape, 0 for padding, which must come first; None for none.

        Returns:
            Logits of the last token, `[batch, vocabulary]`.
        """
        cache = self.cache
        assert cache is not None
        tokens = ids.shape[1]
        cache.padded = mask is not None
        allowed = None
        if mask is None:
            positions = torch.arange(tokens, device=ids.device).expand_as(ids)
            cache.allowed[..., :tokens] = True
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp_(min=0)
            cache.allowed[..., :tokens] = mask.bool()[:, None, None, :]
            square = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril_()
            # padding attends to itself: a row of nothing would be NaN, and stay it
            own = torch.eye(tokens, dtype=torch.bool, device=ids.device)
            allowed = (square & cache.allowed[..., :tokens]) | own
        cache.length = tokens

        def attend(q: Tensor, number: int, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[number][:, :, :tokens] = k
            cache.values[number][:, :, :tokens] = v
            repeat = self.weights.heads // self.weights.kv_heads
            if repeat > 1:
                k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, is_causal=allowed is None and tokens > 1
            )

        return self._run(ids, positions, attend)

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run one more token of each sequence.

        Args:
            ids: `[batch]`.
            positions: `[batch]`, counted without padding.

        Returns:
            Logits, `[batch, vocabulary]`; with graphs they are overwritten by the next step.
        """
        cache = self.cache
        assert cache is not None
        at = cache.length
        cache.length += 1
        if self.graphs:
            return self._replayed(ids, positions, at)
        cache.allowed[..., at] = True
        allowed = cache.allowed[..., : at + 1] if cache.padded else None

        def attend(q: Tensor, number: int, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[number], cache.values[number]
            keys[:, :, at : at + 1] = k
            values[:, :, at : at + 1] = v
            return self._one_query(q, keys[:, :, : at + 1], values[:, :, : at + 1], allowed)

        return self._run(ids[:, None], positions[:, None], attend)

    def _one_query(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention of one token; heads that share keys stand as rows of one matrix, so that nothing is copied."""
        batch, heads, _, width = q.shape
        rows = q.view(batch, k.shape[1], heads // k.shape[1], width)
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=allowed)
        return out.reshape(batch, heads, 1, width)

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Callable[[Tensor, int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        weights = self.weights
        batch, tokens = ids.shape
        x = weights.embed(ids, positions).flatten(0, 1)
        turn = None
        if self._tables is not None:
            turn = tuple(table[positions][:, None] for table in self._tables)
        for number, layer in enumerate(weights.layers):
            q, k, v = self._heads(layer, x, batch, tokens, turn)
            mixed = attend(q, number, k, v).transpose(1, 2).reshape(batch * tokens, -1)
            x = x + layer.out(mixed)
            x = x + layer.mlp(layer.norm_2(x))
        last = x.view(batch, tokens, -1)[:, -1]
        return weights.head(weights.norm(last))

    def _heads(
        self, layer: Layer, x: Tensor, batch: int, tokens: int, turn: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, shared, width = self.weights.heads, self.weights.kv_heads, self.weights.head_dim
        packed = layer.qkv(layer.norm_1(x)).view(batch, tokens, own + 2 * shared, width)
        packed = packed.transpose(1, 2)
        if turn is not None:
            both = packed[:, : own + shared]
            half = width // 2
            swapped = torch.cat((-both[..., half:], both[..., :half]), dim=-1)
            both = both * turn[0] + swapped * turn[1]
            return both[:, :own], both[:, own:], packed[:, own + shared :]
        return packed[:, :own], packed[:, own : own + shared], packed[:, own + shared :]

    # - the captured step

    def _replayed(self, ids: Tensor, positions: Tensor, at: int) -> Tensor:
        accelerator = get_accelerator()
        if self._graph is None:
            self._ids, self._positions = ids[:, None].clone(), positions[:, None].clone()
            self._at = torch.full((1,), at, dtype=torch.long, device=ids.device)
            # libraries set themselves up in the first passes, which a capture may not record
            accelerator.synchronize()
            stream = accelerator.Stream() if accelerator.Stream is not None else None
            with accelerator.stream(stream):
                for _ in range(2):
                    self._static_step()
            accelerator.synchronize()
            self._graph = accelerator.create_graph()
            with accelerator.capture_to_graph(self._graph):
                self._logits = self._static_step()
        assert self._ids is not None and self._positions is not None and self._at is not None
        self._ids.copy_(ids[:, None])
        self._positions.copy_(positions[:, None])
        self._at.fill_(at)
        accelerator.replay_graph(self._graph)
        return self._logits

    def _static_step(self) -> Tensor:
        """A step whose every tensor stays where it is; its place in the cache is a number on the device."""
        cache, at = self.cache, self._at
        assert cache is not None and at is not None
        cache.allowed.index_fill_(3, at, True)

        def attend(q: Tensor, number: int, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[number], cache.values[number]
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            return self._one_query(q, keys, values, cache.allowed)

        return self._run(self._ids, self._positions, attend)
