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
from deepspeed.checkpoint.atomic import Crew
from deepspeed.runtime import engine_checkpoint
from deepspeed.runtime.dataloader import DeepSpeedDataLoader, RepeatingLoader
from deepspeed.runtime.pipe.module import PipelineModule

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
    assert "ds_random_states" not in client and "ds_loader_position" not in client
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


def test_old_and_reserved_names_in_a_client_state(tmp_path: Path) -> None:
    mine = {"random_states": [1], "training_dataloader": "x"}
    made = engine(1)
    made.save_checkpoint(tmp_path, client_state=mine)
    _, client = made.load_checkpoint(tmp_path)
    assert {key: client[key] for key in mine} == mine
    for key in ("ds_random_states", "ds_loader_position"):
        with pytest.raises(KeyError, match=key):
            made.save_checkpoint(tmp_path, client_state={key: 1})


def test_every_model_file_has_the_random_states_of_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(1)
    # as on a rank that writes a model file of its own without leading the save
    crew = Crew(0, 1, False, lambda item: [item, item] if isinstance(item[1], dict) else [item])
    files: dict[str, Any] = {}
    monkeypatch.setattr(engine_checkpoint, "crew_of", lambda engine: crew)
    monkeypatch.setattr(
        made.checkpoint_engine, "store", lambda publication, content, as_zip: files.update(content)
    )
    made.save_checkpoint(tmp_path)
    assert len(files["mp_rank_00_model_states.pt"]["ds_random_states"]) == 2


@pytest.mark.parametrize("own_iterator", [True, False])
def test_a_repeating_loader_has_the_position_of_its_loader(own_iterator: bool) -> None:
    data = TensorDataset(torch.arange(SAMPLES))

    class Apart:
        """A loader whose iterators are objects of their own."""

        def __init__(self) -> None:
            self.inner = loader_of(data)
            self.state_dict, self.load_state_dict = (
                self.inner.state_dict,
                self.inner.load_state_dict,
            )

        def __iter__(self) -> Any:
            iter(self.inner)
            return (next(self.inner) for _ in range(len(self.inner)))

    def made() -> RepeatingLoader:
        return RepeatingLoader(loader_of(data) if own_iterator else Apart())

    first, second = made(), made()
    for _ in range(4):
        next(first)
    next(second)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        assert torch.equal(next(second)[0], next(first)[0])
    assert hasattr(first, "data_sampler") == own_iterator
    plain = RepeatingLoader([1, 2])
    assert not hasattr(plain, "state_dict")
    plain.load_state_dict({"samples": 4})
    assert next(plain) == 1


def pipeline() -> Any:
    torch.manual_seed(3)
    deepspeed.init_distributed("gloo")
    model = PipelineModule(
        [torch.nn.Linear(3, 1)],
        num_stages=1,
        loss_fn=lambda out, y: (out[:, 0] - y).square().mean(),
    )
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
    }
    x = torch.arange(3.0 * SAMPLES).view(SAMPLES, 3) / SAMPLES
    data = TensorDataset(x, x.sum(1))
    return deepspeed.initialize(model=model, training_data=data, config=config)[0]


@pytest.mark.parametrize("repeating", [True, False])
def test_a_pipeline_goes_on_with_the_batches_that_come_next(
    repeating: bool, tmp_path: Path
) -> None:
    def made() -> Any:
        new = pipeline()
        if not repeating:
            new.set_dataloader(new.training_dataloader.loader)
        return new

    first = made()
    for _ in range(3):
        first.train_batch()
    first.save_checkpoint(tmp_path)
    wanted = [first.train_batch().item() for _ in range(2)]
    second = made()
    second.train_batch()
    second.load_checkpoint(tmp_path)
    assert [second.train_batch().item() for _ in range(2)] == wanted


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
