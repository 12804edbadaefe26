# SPDX-License-Identifier: Apache-2.0
"""A saved weight that is read where and when it is needed: whole, or the elements that one rank keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .format import Model, zero3_model_file
from .reshard import FP32, SavedState

Runs = Callable[[int, int], Iterator[tuple[int, torch.Tensor]]]


@dataclass(frozen=True)
class SavedWeight:
    """A weight somewhere in the files of a checkpoint.

    Attributes:
        shape: of the whole weight.
        runs: gives, for a start and a length in elements, what there is of them: pairs of the place relative to the
            start, and the values (flat; they may be a file's memory).
    """

    shape: torch.Size
    runs: Runs

    def elements(self, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Elements `[start, start + length)`, flat, in new memory."""
        found = torch.empty(length, dtype=dtype, device="cpu")
        for place, values in self.runs(start, length):
            found.narrow(0, place, values.numel()).copy_(values)
        return found

    def whole(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All of it in its shape; the file's own memory, if it is there in a row and in that dtype."""
        numel = self.shape.numel()
        found = list(self.runs(0, numel))
        if len(found) == 1 and found[0][1].numel() == numel:
            return found[0][1].to(dtype or found[0][1].dtype).view(self.shape)
        kind = dtype or (found[0][1].dtype if found else torch.float32)
        return self.elements(0, numel, kind).view(self.shape)


def of_tensor(tensor: torch.Tensor) -> SavedWeight:
    """A weight that was saved whole."""
    return SavedWeight(
        tensor.shape,
        lambda start, length: iter([(0, tensor.detach().reshape(-1).narrow(0, start, length))]),
    )


def of_masters(saved: SavedState, name: str) -> SavedWeight:
    """A weight by its master weights, over however many shards they are spread."""

    def runs(start: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        for place, slot, begin, count in saved.runs(name, start, length):
            yield place, slot.tensors[FP32].narrow(0, begin, count)

    return SavedWeight(torch.Size(saved.shapes[name]), runs)


def of_frozen(
    model: Mapping[str, Any], world: int, load: Callable[[str], Mapping[str, Any]], mp_rank: int
) -> dict[str, SavedWeight]:
    """The frozen weights of stage 3, of which each rank saved its slice.

    Args:
        model: the model file of the first rank.
        world: over how many ranks they are spread.
        load: gives the content of a model file; called once for each further rank whose slice is wanted.
        mp_rank: the model-parallel rank.
    """

    @functools.cache
    def open_rank(rank: int) -> Mapping[str, Any]:
        return load(zero3_model_file(rank, mp_rank)) if rank else model

    def weight(name: str, shape: torch.Size) -> SavedWeight:
        piece = -(-shape.numel() // world)

        def runs(start: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
            end = min(start + length, shape.numel())
            while start < end:
                rank, within = divmod(start, piece)
                count = min(end - start, piece - within)
                held = open_rank(rank)[Model.FROZEN_PARAM_FRAGMENTS][name].reshape(-1)
                yield length - (end - start), held.narrow(0, within, count)
                start += count

        return SavedWeight(shape, runs)

    shapes = model.get(Model.FROZEN_PARAM_SHAPES) or {}
    return {name: weight(name, torch.Size(shape)) for name, shape in shapes.items()}
