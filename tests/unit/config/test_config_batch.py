# SPDX-License-Identifier: Apache-2.0
"""The batch triad: what is derived from what, and which combinations cannot be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed.runtime.config import BATCH_KEYS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_batch import complete_batch

PROVIDED = "either train_batch_size or train_micro_batch_size_per_gpu"
UNEQUAL = (
    "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * "
    "gradient_acc_step * world_size"
)


class Ranks:
    """An mpu that knows its data-parallel size."""

    def __init__(self, size):
        self.size = size

    def get_data_parallel_world_size(self):
        return self.size


class SequenceRanks:
    """An mpu of Ulysses: it knows only the sequence-parallel size."""

    def __init__(self, size):
        self.size = size

    def get_sequence_parallel_world_size(self):
        return self.size


class MeshOf:
    """A device mesh whose data-parallel group has a size."""

    def __init__(self, size):
        self._size = size

    def get_group(self, mesh_dim):
        assert mesh_dim == "data_parallel"
        return self

    def size(self):
        return self._size


def batch_config(train=None, micro=None, steps=None, **more):
    given = dict(zip(BATCH_KEYS, (train, micro, steps), strict=True))
    return {**{key: value for key, value in given.items() if value is not None}, **more}


def triad(config):
    return tuple(getattr(config, key) for key in BATCH_KEYS)


@pytest.mark.parametrize(
    ("given_triad", "world", "expected"),
    [
        ((32, 4, 2), 4, (32, 4, 2)),
        ((32, 4, None), 4, (32, 4, 2)),
        ((32, None, 2), 4, (32, 4, 2)),
        ((None, 4, 2), 4, (32, 4, 2)),
        ((32, None, None), 4, (32, 8, 1)),
        ((None, 4, None), 4, (16, 4, 1)),
        ((1, None, None), 1, (1, 1, 1)),
        ((8.0, None, 2.0), 1, (8, 4, 2)),
    ],
)
def test_what_is_left_out_is_derived(given_triad, world, expected):
    config = DeepSpeedConfig(batch_config(*given_triad), mpu=Ranks(world))
    assert triad(config) == expected
    assert all(type(value) is int for value in triad(config))
    assert config.world_size == world


@pytest.mark.parametrize("steps", [None, 2])
def test_one_of_the_two_batch_sizes_is_needed(steps):
    with pytest.raises(AssertionError, match=PROVIDED):
        DeepSpeedConfig(batch_config(steps=steps))


@pytest.mark.parametrize(
    ("given_triad", "world", "said"),
    [
        ((4, 3, None), 1, "4 != 3 * 1 * 1"),
        ((32, 4, 3), 4, "32 != 4 * 3 * 4"),
        ((10, None, 4), 1, "10 != 2 * 4 * 1"),
        ((2, None, None), 4, "2 != 0 * 1 * 4"),
        ((4, 8, None), 1, "4 != 8 * 0 * 1"),
    ],
)
def test_impossible_triads_say_the_numbers_and_one_that_fits(given_triad, world, said):
    with pytest.raises(AssertionError) as caught:
        DeepSpeedConfig(batch_config(*given_triad), mpu=Ranks(world))
    text = str(caught.value)
    assert UNEQUAL in text and said in text
    assert isinstance(caught.value, DeepSpeedConfigError)
    offered = int(text.rstrip(".").split()[-1])
    _, micro, steps = given_triad
    assert DeepSpeedConfig(batch_config(offered, micro, steps), mpu=Ranks(world))


@pytest.mark.parametrize("key", BATCH_KEYS)
@pytest.mark.parametrize("value", [0, -1])
def test_each_has_to_be_above_zero(key, value):
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, key: value}
    with pytest.raises(AssertionError, match=f"{value} has to be greater than 0") as caught:
        DeepSpeedConfig(config)
    assert key in str(caught.value)


@pytest.mark.parametrize("key", BATCH_KEYS)
@pytest.mark.parametrize("value", ["8", "auto", True, [8], {}])
def test_wrong_types_are_type_errors_that_name_the_key(key, value):
    with pytest.raises(TypeError, match=key) as caught:
        DeepSpeedConfig({"train_batch_size": 8, key: value})
    assert isinstance(caught.value, DeepSpeedConfigError)


def test_auto_says_what_is_expected_and_who_fills_it_in():
    with pytest.raises(TypeError) as caught:
        DeepSpeedConfig({"train_batch_size": "auto"})
    text = str(caught.value)
    assert "'train_batch_size'" in text and "auto" in text
    assert "whole number above 0" in text and "Trainer" in text and "accelerate" in text


@pytest.mark.parametrize("value", [2.5, float("inf"), float("nan")])
def test_fractions_are_value_errors(value):
    with pytest.raises(ValueError, match="train_batch_size"):
        DeepSpeedConfig({"train_batch_size": value})


def test_outside_of_a_job_there_is_one_rank():
    config = DeepSpeedConfig({"train_batch_size": 4})
    assert (config.global_rank, config.world_size) == (0, 1)


def test_sequence_parallel_size_divides_nothing_outside_of_a_job():
    config = DeepSpeedConfig({"train_batch_size": 4, "sequence_parallel_size": 2})
    assert config.world_size == 1 and type(config.world_size) is int


@pytest.mark.parametrize(
    ("arguments", "keys", "world"),
    [
        ({"mpu": Ranks(2)}, {"sequence_parallel_size": 4}, 2),  # mpu decides before the key
        ({"mpu": SequenceRanks(4)}, {}, 2),
        ({"mpu": SequenceRanks(4), "mesh_device": MeshOf(8)}, {}, 2),
        ({"mesh_device": MeshOf(4)}, {"sequence_parallel_size": 8}, 4),
        ({}, {"sequence_parallel_size": 2}, 4),
        ({}, {}, 8),
    ],
)
def test_order_in_which_the_data_parallel_size_is_found(monkeypatch, arguments, keys, world):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 8)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 5)
    config = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **keys}, **arguments)
    assert (config.global_rank, config.world_size, config.train_batch_size) == (5, world, world)


@pytest.mark.parametrize("size", [3, 0, 16])
def test_sequence_parallel_size_that_does_not_divide_the_ranks_is_refused(monkeypatch, size):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 8)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(AssertionError, match="does not divide"):
        DeepSpeedConfig({"train_batch_size": 8, "sequence_parallel_size": size})


sizes = st.integers(1, 64)


@given(sizes, sizes, sizes, st.sets(st.sampled_from([0, 1, 2]), max_size=1))
def test_any_two_of_a_true_triad_give_the_third(micro, steps, world, left_out):
    whole = (micro * steps * world, micro, steps)
    seen = [None if i in left_out else value for i, value in enumerate(whole)]
    assert complete_batch(*seen, world) == whole


@given(*[st.none() | st.integers(-2, 70)] * 3, sizes)
def test_result_always_holds_the_equation_and_keeps_what_was_given(train, micro, steps, world):
    seen = (train, micro, steps)
    try:
        found = complete_batch(*seen, world)
    except AssertionError:
        return
    assert found[0] == found[1] * found[2] * world and min(found) > 0
    assert all(value is None or value == result for value, result in zip(seen, found, strict=True))


@given(*[st.none() | st.integers(1, 40)] * 3, st.integers(1, 8))
def test_refused_triads_have_no_solution_of_the_documented_form(train, micro, steps, world):
    """Brute force over the definition, independent of the rules by which values are derived."""
    try:
        complete_batch(train, micro, steps, world)
        return
    except AssertionError:
        pass
    if train is None and micro is None:
        return
    free_steps = [steps] if steps is not None else range(1, 41) if micro is not None else [1]
    free_micro = [micro] if micro is not None else range(1, 41)
    possible = [(m, g) for m in free_micro for g in free_steps if train in (None, m * g * world)]
    assert possible == []


def test_a_triad_changed_by_hand_is_completed_anew():
    config = DeepSpeedConfig({"train_batch_size": 8}, mpu=Ranks(2))
    config.train_batch_size, config.gradient_accumulation_steps = None, 3
    config._configure_train_batch_size()
    assert [getattr(config, key) for key in BATCH_KEYS] == [24, 4, 3]
    config.gradient_accumulation_steps = 2
    with pytest.raises(AssertionError, match=re.escape(UNEQUAL)):
        config._configure_train_batch_size()


def test_batches_that_fit_one_rank_only_say_how_that_comes_about():
    with pytest.raises(AssertionError, match=r"They fit one rank, and there are 2.*gloo"):
        complete_batch(16, 8, 2, 2)
    with pytest.raises(AssertionError) as caught:
        complete_batch(17, 8, 2, 2)
    assert "They fit one rank" not in str(caught.value)


def test_sizes_that_count_tensor_parallel_ranks_are_taken_as_they_are(monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.config.distributed_rank_and_size", lambda: (0, 4))

    def sizes(*values, tensor=2):
        section = {"tensor_parallel": {"autotp_size": tensor}}
        config = DeepSpeedConfig(dict(zip(BATCH_KEYS, values, strict=True)) | section, mpu=Ranks(2))
        return tuple(getattr(config, key) for key in BATCH_KEYS)

    assert sizes(32, 2, 4) == (32, 2, 4)
    assert sizes(16, 2, 4) == (16, 2, 4)
    assert sizes(16, 2, None) == (16, 2, 4)
    for values, tensor in (((24, 2, 4), 2), ((64, 2, 4), 2), ((32, 2, 4), 1), ((32, 2, 4), 4)):
        with pytest.raises(DeepSpeedConfigError, match=UNEQUAL.split(".")[0]):
            sizes(*values, tensor=tensor)
