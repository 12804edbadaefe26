# SPDX-License-Identifier: Apache-2.0
"""Which samples each rank gets, in which order, and how the loader behaves as an iterator."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler, TensorDataset

from deepspeed.runtime import dataloader
from deepspeed.runtime.dataloader import DeepSpeedDataLoader, RepeatingLoader, build_dataloader


def numbers(count):
    return TensorDataset(torch.arange(count))


def flat(loader):
    return [batch[0].tolist() for batch in loader]


def samples(loader):
    return [sample for batch in flat(loader) for sample in batch]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(7))


class CountedStream(Stream):
    def __len__(self):
        return 7


class Timer:
    def __init__(self):
        self.starts = 0

    def start(self):
        self.starts += 1


def test_ranks_share_the_dataset_without_overlap():
    shares = [
        samples(build_dataloader(numbers(12), 2, data_parallel_rank=r, data_parallel_world_size=3))
        for r in range(3)
    ]
    assert sorted(shares[0] + shares[1] + shares[2]) == list(range(12))
    assert {len(share) for share in shares} == {4}


def test_training_order_is_that_of_a_distributed_sampler_with_seed_zero():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    loader = build_dataloader(numbers(10), 4)
    assert samples(loader) == order
    assert samples(loader) == order  # again in the next epoch, unless told of it
    loader.data_sampler.set_epoch(1)
    assert samples(loader) != order


@pytest.mark.parametrize("route", ["eval", "predict"])
def test_other_routes_keep_the_order_and_the_clock(route):
    timer = Timer()
    loader = build_dataloader(numbers(5), 2, route=route, tput_timer=timer)
    assert flat(loader) == [[0, 1], [2, 3], [4]]
    assert timer.starts == 0


def test_shuffling_can_be_switched_off():
    assert flat(build_dataloader(numbers(4), 2, shuffle=False)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("count", "batch", "drop", "batches"),
    [(10, 4, False, 3), (10, 4, True, 2), (8, 4, False, 2), (3, 4, True, 0), (0, 4, False, 0)],
)
def test_length_is_the_number_of_batches(count, batch, drop, batches):
    loader = build_dataloader(
        numbers(count),
        batch,
        data_sampler=SequentialSampler(range(count)),
        dataloader_drop_last=drop,
    )
    assert len(loader) == loader.len == batches == len(list(loader))


def test_length_counts_the_share_and_not_the_dataset():
    loader = build_dataloader(numbers(10), 2, data_parallel_rank=1, data_parallel_world_size=2)
    assert len(loader) == 3


def test_own_sampler_and_collate_are_used():
    loader = build_dataloader(
        numbers(4),
        2,
        data_sampler=SequentialSampler(range(4)),
        collate_fn=lambda samples: [int(sample[0]) for sample in samples],
    )
    assert list(loader) == [[0, 1], [2, 3]]


def test_the_loader_is_its_own_iterator_and_starts_anew():
    loader = build_dataloader(numbers(4), 2, shuffle=False)
    assert next(loader)[0].tolist() == [0, 1]
    assert iter(loader) is loader
    assert flat(loader) == [[0, 1], [2, 3]]
    with pytest.raises(StopIteration):
        next(loader)


def test_the_throughput_clock_starts_before_each_batch():
    timer = Timer()
    loader = build_dataloader(numbers(4), 2, tput_timer=timer)
    next(loader)
    next(loader)
    assert timer.starts == 2


def test_iterable_datasets_stream_without_a_sampler():
    loader = build_dataloader(Stream(), 3)
    assert loader.data_sampler is None
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(TypeError):
        len(loader)
    assert len(build_dataloader(CountedStream(), 3)) == 3


@pytest.mark.parametrize("thing", [5, iter([1]), None])
def test_what_is_no_dataset_is_refused(thing):
    with pytest.raises(ValueError, match="must be a torch Dataset"):
        build_dataloader(thing, 2)


def test_lists_are_datasets():
    loader = build_dataloader([1, 2, 3], 3, shuffle=False)
    assert [batch.tolist() for batch in loader] == [[1, 2, 3]]


def test_kinds_of_dataset():
    things = [[1], numbers(2), Stream(), 5, {}]
    assert [dataloader.is_map_style_dataset(x) for x in things] == [True, True, False, False, True]
    assert [dataloader.is_iterable_style_dataset(x) for x in things] == [0, 0, 1, 0, 0]


def test_without_a_rank_the_whole_dataset_is_sampled():
    loader = DeepSpeedDataLoader(numbers(6), 3, True, -1, None)
    assert sorted(samples(loader)) == list(range(6))


def test_with_a_rank_but_no_process_group_there_is_one_share():
    loader = DeepSpeedDataLoader(numbers(6), 3, True, 0, None)
    assert sorted(samples(loader)) == list(range(6))


def test_post_processing_sees_batch_and_sampler_state():
    loader = build_dataloader(numbers(2), 2, shuffle=False)
    loader.post_process_func = lambda batch, state: (batch[0].tolist(), state)
    assert list(loader) == [([0, 1], {})]
    loader.data_sampler.state_dict = lambda: {"step": 3}
    assert list(loader) == [([0, 1], {"step": 3})]


@pytest.mark.parametrize(
    ("device", "platform", "asked", "workers"),
    [
        ("cpu", "linux", None, 0),
        ("cuda", "linux", None, 2),
        ("cuda", "win32", None, 0),
        ("cpu", "win32", 3, 3),
        ("cuda", "linux", 0, 0),
    ],
)
def test_default_workers_and_pinning(monkeypatch, device, platform, asked, workers):
    accelerator = SimpleNamespace(device_name=lambda: device, device_count=lambda: 8)
    monkeypatch.setattr(dataloader, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(dataloader.os, "cpu_count", lambda: 16)
    loader = build_dataloader(numbers(2), 2, num_local_io_workers=asked)
    assert loader.num_local_io_workers == workers
    assert loader.pin_memory == (device == "cuda")


def test_workers_make_the_same_batches():
    loader = build_dataloader(numbers(6), 2, shuffle=False, num_local_io_workers=1)
    assert flat(loader) == [[0, 1], [2, 3], [4, 5]]


def test_curriculum_learning_without_its_sampler_is_refused():
    with pytest.raises(ValueError, match="DeepSpeedDataSampler"):
        build_dataloader(
            numbers(2), 2, deepspeed_dataloader_config={"curriculum_learning": {"enabled": True}}
        )


def test_repeating_loader_starts_again():
    loader = RepeatingLoader([1, 2])
    assert iter(loader) is loader
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]


def test_repeating_loader_of_nothing_stops():
    with pytest.raises(StopIteration):
        next(RepeatingLoader([]))


def test_repeating_a_loader_repeats_its_epoch():
    loader = RepeatingLoader(build_dataloader(numbers(4), 2, shuffle=False))
    assert [next(loader)[0].tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
