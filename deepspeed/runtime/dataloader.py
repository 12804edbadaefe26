# SPDX-License-Identifier: Apache-2.0
"""Batches for one data-parallel rank: a torch DataLoader with the right sampler, as one iterator."""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain

ROUTE_TRAIN = "train"
ROUTE_EVAL = "eval"
ROUTE_PREDICT = "predict"

_CURRICULUM = "curriculum_learning"
_OF_THE_LOADER = frozenset({"state_dict", "data_sampler"})


def is_map_style_dataset(obj: Any) -> bool:
    """Whether items can be had by index and be counted."""
    return hasattr(obj, "__getitem__") and hasattr(obj, "__len__")


def is_iterable_style_dataset(obj: Any) -> bool:
    """Whether it is a torch IterableDataset (which shards itself over the ranks)."""
    return isinstance(obj, IterableDataset)


class RepeatingLoader:
    """An iterator that starts its loader again whenever it ends.

    It does not tell the sampler of the new epoch; call `sampler.set_epoch` for another order. The position and the
    sampler are those of its loader, where that has them.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_LOADER and "loader" in self.__dict__:
            return getattr(self.loader, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, if this one's loader can."""
        if hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(state)
            if self.data_iter is not self.loader:
                self.data_iter = iter(self.loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class DeepSpeedDataLoader:
    """Batches of a dataset for one data-parallel rank; it is its own iterator.

    `iter()` starts anew. `state_dict` and `load_state_dict` carry the position in an epoch over to another
    process: the next batch is then the one that would have come. Batches are made in this process unless workers are asked for or there is
    a CUDA device to feed (not on Windows, where a worker starts slowly and must pickle everything).

    Args:
        dataset: map-style dataset, or IterableDataset (which has no sampler and shards itself).
        batch_size: samples of one micro batch of one rank.
        pin_memory: put batches into pinned memory; only done where there is a CUDA device.
        local_rank: negative samples the whole dataset; otherwise each rank gets its share.
        tput_timer: its `start()` is called before each batch; None for none.
        collate_fn: makes a batch of a list of samples; None is torch's default.
        num_local_io_workers: worker processes; None chooses as said above.
        data_sampler: torch sampler, or one of whole micro batches (it has `yields_batches`); None takes a shuffling one.
        data_parallel_world_size: number of shares; None asks torch.distributed.
        data_parallel_rank: which share is ours; None asks torch.distributed.
        dataloader_drop_last: leave out a last batch that is not full.
        deepspeed_dataloader_config: settings of curriculum learning, which needs a sampler of micro batches.

    Raises:
        ValueError: curriculum learning is asked for, and there is no such sampler.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        pin_memory: bool,
        local_rank: int,
        tput_timer: Any,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Any = None,
        data_parallel_world_size: int | None = None,
        data_parallel_rank: int | None = None,
        dataloader_drop_last: bool = False,
        deepspeed_dataloader_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.deepspeed_dataloader_config = dict(deepspeed_dataloader_config or {})
        self.curriculum_learning_enabled = getattr(data_sampler, "yields_batches", False)
        if (
            self.deepspeed_dataloader_config.get(_CURRICULUM)
            and not self.curriculum_learning_enabled
        ):
            raise ValueError(
                explain(
                    "curriculum learning needs a sampler",
                    got=type(data_sampler).__name__,
                    expected="data_sampler=DeepSpeedDataSampler(...)",
                    fix="let engine.deepspeed_io or deepspeed.initialize make the loader",
                )
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.tput_timer = tput_timer
        self.collate_fn = collate_fn
        self.dataloader_drop_last = dataloader_drop_last
        self.post_process_func: Callable[[Any, dict[str, Any]], Any] | None = None

        on_cpu = get_accelerator().device_name() == "cpu"
        self.pin_memory = pin_memory and not on_cpu
        self.device_count = 1 if local_rank >= 0 else get_accelerator().device_count()
        if num_local_io_workers is None:
            num_local_io_workers = 0 if on_cpu else _default_workers(self.device_count)
        self.num_local_io_workers = num_local_io_workers

        if data_sampler is None and not is_iterable_style_dataset(dataset):
            if local_rank >= 0:
                data_sampler = _share_of(dataset, data_parallel_rank, data_parallel_world_size)
            else:
                data_sampler = RandomSampler(dataset)
        self.data_sampler = data_sampler
        self.dataloader: DataLoader | None = None
        self.data: Iterator[Any] | None = None
        self._given = 0
        self._order_rng: torch.Tensor | None = None
        self._resume: dict[str, Any] | None = None
        self._ahead: deque[dict[str, Any]] = deque()
        self._loads = 0

    def __len__(self) -> int:
        """Number of batches of this rank.

        Raises:
            TypeError: the dataset or sampler does not know its length.
        """
        counted = self.dataset if self.data_sampler is None else self.data_sampler
        if self.curriculum_learning_enabled:
            return counted.num_batches
        full, rest = divmod(len(counted), self.batch_size)
        return full if self.dataloader_drop_last or not rest else full + 1

    @property
    def len(self) -> int:
        """Number of batches of this rank."""
        return self.__len__()

    def __iter__(self) -> DeepSpeedDataLoader:
        if self.curriculum_learning_enabled:
            self._start_batches()
            return self
        position, self._resume = self._resume, None
        self._given = 0
        if position is not None:
            self._continue(position)
            return self
        self._order_rng = None
        self.dataloader = self._torch_loader(
            batch_size=self.batch_size,
            sampler=self._noting_sampler(),
            drop_last=self.dataloader_drop_last,
        )
        self.data = iter(self.dataloader)
        return self

    def _torch_loader(self, **batching: Any) -> DataLoader:
        """A loader of the dataset, with what all of this one's have in common."""
        return DataLoader(
            self.dataset,
            num_workers=self.num_local_io_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            **batching,
        )

    def _start_batches(self) -> None:
        """Go on with the sampler's micro batches; those that workers made ahead are drawn again."""
        sampler = self.data_sampler
        if self._ahead and self._loads == sampler.loads:
            sampler.load_state_dict(sampler.state_dict())
        self._ahead, self._loads = deque(), sampler.loads
        self.dataloader = self._torch_loader(batch_sampler=_Stated(sampler, self._ahead))
        self.data = iter(self.dataloader)

    def __next__(self) -> Any:
        if self.data is None or self._loads != getattr(self.data_sampler, "loads", 0):
            iter(self)
        assert self.data is not None
        if self.tput_timer is not None:
            self.tput_timer.start()
        try:
            batch = next(self.data)
        except StopIteration:
            self._given = 0
            raise
        self._given += 1
        if self._ahead:
            self.data_sampler.note_given(self._ahead.popleft())
        if self.post_process_func is None:
            return batch
        state = getattr(self.data_sampler, "state_dict", dict)()
        return self.post_process_func(batch, state)

    # - position

    def _noting_sampler(self) -> Any:
        """The sampler; one that draws its order from torch's generator notes the state that it draws from."""
        if self.data_sampler is None or isinstance(self.data_sampler, DistributedSampler):
            return self.data_sampler
        return _Noting(self)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands: samples given on all ranks, the sampler's epoch, what its order was drawn from."""
        if self.curriculum_learning_enabled:
            return self.data_sampler.state_dict()
        if self._resume is not None:
            return dict(self._resume)
        replicas = getattr(self.data_sampler, "num_replicas", 1)
        return {
            "samples": self._given * self.batch_size * replicas,
            "epoch": getattr(self.data_sampler, "epoch", None),
            "order_rng": self._order_rng if self._given else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood: the next batch, or the next `iter()`, continues its epoch.

        An epoch of which nothing is left starts anew. Where the number of ranks or the batch size has changed, a part of a batch may
        be given twice.
        """
        self.data = None
        self._given = 0
        if self.curriculum_learning_enabled:
            return self.data_sampler.load_state_dict(state)
        epoch = state.get("epoch")
        if epoch is not None and hasattr(self.data_sampler, "set_epoch"):
            self.data_sampler.set_epoch(epoch)
        replicas = getattr(self.data_sampler, "num_replicas", 1)
        given = int(state.get("samples", 0)) // (self.batch_size * replicas)
        over = not is_iterable_style_dataset(self.dataset) and given >= len(self)
        self._resume = dict(state) if given and not over else None

    def _continue(self, position: Mapping[str, Any]) -> None:
        """Start an epoch behind the batches that were given before, without making them where that is possible."""
        replicas = getattr(self.data_sampler, "num_replicas", 1)
        given = int(position["samples"]) // (self.batch_size * replicas)
        now = torch.get_rng_state()
        try:
            if is_iterable_style_dataset(self.dataset):
                self.dataloader = self._torch_loader(
                    batch_size=self.batch_size, drop_last=self.dataloader_drop_last
                )
                self.data = itertools.islice(iter(self.dataloader), given, None)
            else:
                if position.get("order_rng") is not None:
                    torch.set_rng_state(position["order_rng"].clone())
                sampler = self.data_sampler or SequentialSampler(self.dataset)
                batches = iter(BatchSampler(sampler, self.batch_size, self.dataloader_drop_last))
                self._order_rng = position.get("order_rng")
                left = itertools.islice(batches, given, None)
                first = next(left, None)  # the sampler draws its order here
                rest = left if first is None else itertools.chain([first], left)
                self.dataloader = self._torch_loader(batch_sampler=_Given(rest))
                self.data = iter(self.dataloader)
        finally:
            torch.set_rng_state(now)
        self._given = given


class _Noting:
    """A loader's sampler, and a note of the random state before it starts."""

    def __init__(self, loader: DeepSpeedDataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        self._loader._order_rng = torch.get_rng_state()
        yield from self._loader.data_sampler

    def __len__(self) -> int:
        return len(self._loader.data_sampler)


class _Stated:
    """A sampler of micro batches, and its states behind those that were not given yet."""

    def __init__(self, sampler: Any, ahead: deque[dict[str, Any]]) -> None:
        self._sampler, self._states = sampler, ahead

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._sampler:
            self._states.append(self._sampler.live_state())
            yield batch


class _Given:
    """A sampler of batches that were drawn by another."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches


def build_dataloader(
    dataset: Any,
    batch_size: int,
    *,
    route: str = ROUTE_TRAIN,
    data_sampler: Any = None,
    data_parallel_rank: int = 0,
    data_parallel_world_size: int = 1,
    shuffle: bool = True,
    tput_timer: Any = None,
    **options: Any,
) -> DeepSpeedDataLoader:
    """The loader of one data-parallel rank for training, evaluation or prediction.

    Args:
        dataset: map-style dataset or IterableDataset.
        batch_size: samples of one micro batch of one rank.
        route: "train", or "eval" / "predict", which neither shuffle nor count for throughput.
        data_sampler: torch sampler; None takes this rank's share of the dataset.
        data_parallel_rank: which share is ours.
        data_parallel_world_size: number of shares.
        shuffle: whether training shuffles (the same order in each epoch until `set_epoch`).
        tput_timer: throughput timer of the training route.
        options: the remaining arguments of `DeepSpeedDataLoader`, by their names.

    Raises:
        ValueError: `dataset` is neither.
    """
    if not (is_map_style_dataset(dataset) or is_iterable_style_dataset(dataset)):
        raise ValueError(
            explain(
                "Training data must be a torch Dataset",
                got=type(dataset).__name__,
                expected="an object with __getitem__ and __len__, or an IterableDataset",
            )
        )
    rank, world_size = int(data_parallel_rank), int(data_parallel_world_size)
    if data_sampler is None and not is_iterable_style_dataset(dataset):
        shuffle = shuffle and route not in (ROUTE_EVAL, ROUTE_PREDICT)
        data_sampler = _share_of(dataset, rank, world_size, shuffle=shuffle)
    return DeepSpeedDataLoader(
        dataset,
        batch_size,
        options.pop("pin_memory", True),
        options.pop("local_rank", 0),
        tput_timer if route == ROUTE_TRAIN else None,
        data_sampler=data_sampler,
        data_parallel_world_size=world_size,
        data_parallel_rank=rank,
        **options,
    )


def _default_workers(device_count: int) -> int:
    if sys.platform == "win32":
        return 0
    return min(2 * device_count, os.cpu_count() or 1)


def _share_of(
    dataset: Any, rank: int | None, world_size: int | None, shuffle: bool = True
) -> DistributedSampler:
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size is None:
        world_size = torch.distributed.get_world_size() if joined else 1
    if rank is None:
        rank = torch.distributed.get_rank() if joined else 0
    return DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle)
