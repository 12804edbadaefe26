# SPDX-License-Identifier: Apache-2.0
"""A resumed run draws the random numbers and takes the batches that the interrupted one would have."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import IterableDataset, RandomSampler, TensorDataset

import deepspeed
from deepspeed.runtime.dataloader import DeepSpeedDataLoader, RepeatingLoader

SAMPLES = 22


class Data(torch.utils.data.Dataset):
    """Items with noise of their own, which counts how many were made."""

    def __init__(self) -> None:
        self.made = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.made += 1
        return torch.full((3,), float(index)) + 0.1 * torch.randn(3), torch.tensor(float(index))


def engine(seed: int, **settings: Any) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 1},
        **settings,
    }
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), training_data=Data(), config=config
    )[0]


def steps(made: Any, batches: Any, count: int) -> list[Any]:
    seen: list[Any] = []
    for x, y in itertools.islice(batches, count):
        loss = (made(x).squeeze(-1) - y).square().mean()
        made.backward(loss)
        made.step()
        seen.append((y.tolist(), loss.item(), random.random(), numpy.random.rand()))
    return seen


@pytest.mark.parametrize("before", [3, 6, 8])
def test_the_next_batches_and_losses_are_those_of_the_uninterrupted_run(
    before: int, tmp_path: Path
) -> None:
    # six batches make an epoch
    made = engine(1)
    batches = RepeatingLoader(made.training_dataloader)
    steps(made, batches, before)
    made.save_checkpoint(tmp_path)
    wanted = steps(made, batches, 7)
    again = engine(2)
    batches = RepeatingLoader(again.training_dataloader)
    _, client = again.load_checkpoint(tmp_path)
    assert "random_states" not in client and "training_dataloader" not in client
    assert steps(again, batches, 7) == wanted
    assert again.training_dataloader.dataset.made == sum(len(step[0]) for step in wanted)


def test_a_loop_over_the_loader_continues_and_then_starts_anew(tmp_path: Path) -> None:
    made = engine(1)
    loader = made.training_dataloader
    order = [y.tolist() for _, y in loader]
    loop = iter(loader)
    for _ in range(2):
        next(loop)
    made.save_checkpoint(tmp_path)
    again = engine(2)
    again.load_checkpoint(tmp_path)
    assert [y.tolist() for _, y in again.training_dataloader] == order[2:]
    assert [y.tolist() for _, y in again.training_dataloader] == order


def test_it_can_be_switched_off_and_belongs_to_full_resumes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(1)
    loop = iter(made.training_dataloader)
    next(loop)
    made.save_checkpoint(tmp_path)
    for options, switch in (({"load_optimizer_states": False}, "1"), ({}, "0")):
        monkeypatch.setenv("DS_RESUME_POSITION", switch)
        again = engine(2)
        state = torch.get_rng_state()
        again.load_checkpoint(tmp_path, **options)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(list(again.training_dataloader)) == 6


def loader_of(dataset: Any, sampler: Any = None) -> DeepSpeedDataLoader:
    return DeepSpeedDataLoader(dataset, 4, False, 0, None, data_sampler=sampler)


def test_an_order_drawn_from_the_global_generator_continues() -> None:
    data = TensorDataset(torch.arange(SAMPLES))
    torch.manual_seed(5)
    loader = loader_of(data, RandomSampler(data))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state, drawn = loader.state_dict(), torch.get_rng_state()
    rest = [b[0].tolist() for b in loader.data]
    torch.manual_seed(6)
    other = loader_of(data, RandomSampler(data))
    other.load_state_dict(state)
    torch.set_rng_state(drawn)
    assert other.state_dict()["samples"] == 12
    assert next(other)[0].tolist() == rest[0]
    assert other.state_dict()["samples"] == 16
    assert [b[0].tolist() for b in other.data] == rest[1:]
    assert torch.equal(torch.get_rng_state(), drawn)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(SAMPLES))


def test_a_stream_continues_behind_what_was_given() -> None:
    loader = loader_of(Stream())
    loader.load_state_dict({"samples": 8, "epoch": None, "order_rng": None})
    assert [int(x) for b in loader for x in b] == list(range(8, SAMPLES))


class Stateful(RandomSampler):
    """A sampler that keeps its own position."""

    loaded: Any = None

    def state_dict(self) -> dict[str, int]:
        return {"mine": 3}

    def load_state_dict(self, state: Any) -> None:
        self.loaded = state


def test_a_sampler_with_a_state_of_its_own_is_left_to_it(tmp_path: Path) -> None:
    for load in (False, True):
        made = engine(1)
        data = made.training_dataloader.dataset
        made.set_dataloader(made.deepspeed_io(data, data_sampler=Stateful(data)))
        if load:
            made.load_checkpoint(tmp_path)
            assert made.training_dataloader.data_sampler.loaded == {"mine": 3}
            assert len(list(made.training_dataloader)) == 6
        else:
            next(iter(made.training_dataloader))
            made.save_checkpoint(tmp_path)
