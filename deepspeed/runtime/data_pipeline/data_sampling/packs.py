# SPDX-License-Identifier: Apache-2.0
"""Packing sequences: packs of together at most so many tokens, and steps of packs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from ...config_errors import ConfigValueError

_ORDERS = ("random", "seqlen", "dataloader")
# number of the step, numbers of the samples
Pack = tuple[int, list[int]]


def batch_by_seqlens(
    seqlens: Sequence[int] | torch.Tensor | np.ndarray,
    max_tokens: int,
    sequence_ids_per_mb: Sequence[int] | None = None,
    min_batch_size: int = 1,
    max_batch_size: int | None = None,
    sequence_picking_order: str = "dataloader",
    effective_batch_size: int = 1,
    required_microbatches_of_same_size: bool = False,
    verbose: bool = False,
    seed: int | None = None,
) -> tuple[list[Pack], list[int], list[int]]:
    """Pack sequences until the next one would exceed `max_tokens`, and give packs to steps.

    Sequences that are longer than `max_tokens` are left out, as are packs of too few and packs that fill no step.

    Args:
        seqlens: tokens of each sequence.
        max_tokens: tokens of a pack at most.
        sequence_ids_per_mb: numbers of the sequences that `seqlens` are of; None counts from 0.
        min_batch_size: sequences of a pack at least.
        max_batch_size: sequences of a pack at most; None for no bound.
        sequence_picking_order: "dataloader" as they come, "seqlen" the shortest first, or "random".
        effective_batch_size: packs of a step.
        required_microbatches_of_same_size: the packs of a step have as many sequences each, as pipelines need.
        verbose: log the packs.
        seed: of the order "random".

    Returns:
        The packs, each as the number of its step and its sequences; and of each step, how many sequences it has, and the
        longest one's tokens.

    Raises:
        AssertionError: (as ``_NoData``) the sequences fill no step.
        ValueError: an unknown order, or sizes that cannot be.
    """
    if min_batch_size < 1 or (max_batch_size is not None and max_batch_size < min_batch_size):
        raise ConfigValueError(
            explain("no pack can have such a size", got=f"{min_batch_size} to {max_batch_size}")
        )
    lengths = [int(length) for length in seqlens]
    ids = list(range(len(lengths)) if sequence_ids_per_mb is None else sequence_ids_per_mb)
    order = [
        at for at in _order(lengths, sequence_picking_order, seed) if lengths[at] <= max_tokens
    ]
    pack = _same_size if required_microbatches_of_same_size else _greedy
    steps = pack(order, lengths, max_tokens, min_batch_size, max_batch_size, effective_batch_size)
    if not steps:
        raise _NoData(_too_few(len(order), max_tokens, effective_batch_size))
    packs = [
        (step, [ids[place] for place in part]) for step, parts in enumerate(steps) for part in parts
    ]
    sizes = [sum(map(len, parts)) for parts in steps]
    longest = [max(lengths[place] for part in parts for place in part) for parts in steps]
    if verbose:
        for step, part in packs:
            logger.info(
                f"step {step}: sequences {part} of {sizes[step]}, up to {longest[step]} tokens"
            )
    return packs, sizes, longest


def _order(lengths: list[int], picking: str, seed: int | None) -> list[int]:
    if picking not in _ORDERS:
        raise ConfigValueError(
            explain("unknown sequence_picking_order", got=picking, expected=", ".join(_ORDERS))
        )
    order = list(range(len(lengths)))
    if picking == "random":
        random.Random(seed).shuffle(order)
    elif picking == "seqlen":
        order.sort(key=lengths.__getitem__)
    return order


def _too_few(count: int, max_tokens: int, packs: int) -> str:
    return explain(
        "not enough datapoints to create a single sample per dataloader",
        got=f"{count} sequences of at most {max_tokens} tokens",
        expected=f"enough for {packs} packs",
        fix="give more data, or make train_batch_size or min_batch_size smaller",
    )


class _NoData(AssertionError, ValueError):
    """The data fills no batch."""


def _greedy(
    order: list[int],
    lengths: list[int],
    tokens: int,
    least: int,
    most: int | None,
    per_step: int,
) -> list[list[list[int]]]:
    """Packs that are closed when the next sequence does not fit, in steps of `per_step`."""
    packs: list[list[int]] = [[]]
    used = 0
    for place in order:
        full = most is not None and len(packs[-1]) >= most
        if packs[-1] and (full or used + lengths[place] > tokens):
            packs.append([])
            used = 0
        packs[-1].append(place)
        used += lengths[place]
    packs = [pack for pack in packs if len(pack) >= least]
    return [packs[at : at + per_step] for at in range(0, len(packs) - per_step + 1, per_step)]


def _same_size(
    order: list[int],
    lengths: list[int],
    tokens: int,
    least: int,
    most: int | None,
    per_step: int,
) -> list[list[list[int]]]:
    """Steps of `per_step` packs with as many sequences each: dealt one by one, while they fit."""
    steps, at = [], 0
    while at + per_step <= len(order):
        packs: list[list[int]] = [[] for _ in range(per_step)]
        used = [0] * per_step
        while at + per_step <= len(order) and (most is None or len(packs[0]) < most):
            dealt = order[at : at + per_step]
            more = [have + lengths[place] for have, place in zip(used, dealt, strict=True)]
            if max(more) > tokens:
                break
            used = more
            for pack, place in zip(packs, dealt, strict=True):
                pack.append(place)
            at += per_step
        if len(packs[0]) >= least:
            steps.append(packs)
    return steps
