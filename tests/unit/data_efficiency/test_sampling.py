# SPDX-License-Identifier: Apache-2.0
"""From measured samples to a curriculum: the analysis' files, which samples a step may see, going on with a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deepspeed
from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import (
    DataAnalyzer,
    DistributedDataAnalyzer,
)
from deepspeed.runtime.data_pipeline.data_sampling.data_sampler import DeepSpeedDataSampler
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset

COUNT = 40
HARDNESS = [(number * 7) % 10 for number in range(COUNT)]
LENGTHS = [(number * 3) % 8 for number in range(COUNT)]


def hardness(batch):
    return torch.tensor([HARDNESS[number] for number in batch])


def lengths(batch):
    return np.array([LENGTHS[number] for number in batch], np.int16)


def histogram(batch):
    return torch.bincount(hardness(batch), minlength=10)


def analyzer(folder, kind=DataAnalyzer, **options):
    names, functions = ("hard", "long", "counts"), (hardness, lengths, histogram)
    types = ["single_value_per_sample"] * 2 + ["accumulate_value_over_samples"]
    if kind is DataAnalyzer:
        options["metric_dtypes"] = [np.int64, torch.int16, np.int64]
    return kind(
        range(COUNT),
        batch_size=3,
        metric_names=names,
        metric_functions=functions,
        metric_types=types,
        save_path=str(folder),
        collate_fn=list,
        **options,
    )


def arrays(folder, metric, name):
    dataset = MMapIndexedDataset(str(folder / metric / f"{metric}_{name}"))
    found = [dataset[i].tolist() for i in range(len(dataset))]
    dataset.close()
    return found


def check_files(folder):
    assert arrays(folder, "hard", "sample_to_metric") == [[value] for value in HARDNESS]
    assert arrays(folder, "hard", "index_to_metric") == [[value] for value in range(10)]
    by_value = [[n for n in range(COUNT) if LENGTHS[n] == value] for value in range(8)]
    assert arrays(folder, "long", "index_to_sample") == by_value
    assert arrays(folder, "long", "index_to_sample_percentile_merged") == by_value
    assert arrays(folder, "counts", "metric_value") == [np.bincount(HARDNESS).tolist()]


def test_workers_and_threads_leave_the_files_of_one(tmp_path):
    nested = lambda batch: hardness(batch)  # noqa: E731 - cannot be sent to a process
    for worker in range(2):
        part = analyzer(tmp_path, num_workers=2, worker_id=worker, num_threads=2)
        part.metric_functions[0] = nested
        part.run_map()
    analyzer(tmp_path, num_workers=2, num_threads=2).run_reduce()
    check_files(tmp_path)


def test_the_analysis_in_memory_leaves_the_same_files(tmp_path):
    analyzer(tmp_path, DistributedDataAnalyzer, device="cpu").run_map_reduce()
    check_files(tmp_path)


def test_the_entry_index_of_a_batch_numbers_the_samples(tmp_path):
    single = ["single_value_per_sample"]
    options = {"metric_names": ["m"], "metric_types": single, "metric_dtypes": [np.int8]}
    numbered = {"collate_fn": lambda b: {"v": torch.tensor(b), "index": torch.tensor(b) + 100}}
    DataAnalyzer(
        range(5), metric_functions=[lambda b: b["v"] % 2], save_path=tmp_path, **options, **numbered
    ).run_map_reduce()
    assert arrays(tmp_path, "m", "index_to_sample") == [[100, 102, 104], [101, 103]]
    DataAnalyzer(
        range(3),
        metric_functions=[lambda b: torch.tensor(b)],
        save_path=tmp_path,
        collate_fn=list,
        sample_indices=[9, 4, 7],
        **options,
    ).run_map_reduce()
    assert arrays(tmp_path, "m", "index_to_sample") == [[9], [4], [7]]


def test_what_cannot_be_measured_is_refused(tmp_path):
    options = {"metric_names": ["m"], "metric_types": ["single_value_per_sample"]}
    wide = DataAnalyzer(
        range(3),
        metric_functions=[lambda b: b + 300],
        metric_dtypes=[np.uint8],
        save_path=tmp_path,
        **options,
    )
    with pytest.raises(OverflowError, match="do not fit"):
        wide.run_map()
    wide.metric_functions = [lambda b: b / 2]
    with pytest.raises(TypeError, match="must return integers"):
        wide.run_map()
    with pytest.raises(ValueError, match="needs a name"):
        DataAnalyzer(range(3), metric_functions=[], metric_dtypes=[], **options)


def test_percentiles_of_a_metric(tmp_path):
    found = DataAnalyzer([0]).get_metric_value_percentiles("m", {1: 3, 2: 4, 5: 3}, 10)
    assert (found[0], found[30], found[35], found[70], found[75], found[100]) == (1, 1, 2, 2, 5, 5)


# ------------------------------------------------------------------ the sampler


def metric(folder, name, low, high, kind="value", clusters="schedule_based", **schedule):
    schedule = schedule or {"total_curriculum_step": 4, "difficulty_step": 1}
    at = str(folder / name / name)
    return {
        "index_to_sample_path": f"{at}_index_to_sample",
        "index_to_metric_path": f"{at}_index_to_metric",
        "difficulty_type": kind,
        "clustering_type": clusters,
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": "fixed_linear",
        "schedule_config": schedule,
    }


def section(folder, epochs=2, **metrics):
    curriculum = {
        "enabled": True,
        "data_cluster_path": str(folder / "clusters"),
        "curriculum_metrics": metrics,
    }
    sampling = {"enabled": True, "num_epochs": epochs, "curriculum_learning": curriculum}
    return {"enabled": True, "seed": 1234, "data_sampling": sampling}


def sampler(config, micro=2, accumulation=1, **options):
    return DeepSpeedDataSampler(config, COUNT, micro, 0, 1, None, accumulation, 0, **options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    analyzer(folder).run_map_reduce()
    return folder


def test_each_step_sees_samples_that_are_easy_enough(measured, tmp_path):
    config = section(
        tmp_path, hard=metric(measured, "hard", 2, 9), long=metric(measured, "long", 3, 7)
    )
    made = sampler(config, accumulation=2)
    seen = []
    for number, batch in enumerate(made):
        state = made.state_dict()["current_difficulties"]
        step = number // 2 + 1
        assert state == {"hard": min(int(2 + 7 * step / 4), 9), "long": min(3 + step, 7)}
        assert all(HARDNESS[n] <= state["hard"] and LENGTHS[n] <= state["long"] for n in batch)
        seen += batch
    assert len(seen) == 2 * COUNT and made.num_batches == COUNT
    written = MMapIndexedDataset(str(tmp_path / "clusters" / "cluster_hard3_long4"))
    easy = [n for n in range(COUNT) if HARDNESS[n] <= 3 and LENGTHS[n] <= 4]
    assert sorted(written[0].tolist()) == easy
    written.close()


def test_a_cluster_is_used_up_before_a_sample_comes_again(tmp_path):
    one = metric(tmp_path, "none", 1, 2, clusters="single_cluster")
    seen = [n for batch in sampler(section(tmp_path, epochs=3, none=one), micro=4) for n in batch]
    epochs = [seen[at : at + COUNT] for at in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_percentiles_count_different_values(measured, tmp_path):
    config = section(tmp_path, hard=metric(measured, "hard", 20, 100, kind="percentile"))
    made = sampler(config)
    found = made.get_sample_based_on_metric_percentile("hard", 20, 50)
    assert sorted({HARDNESS[n] for n in found}) == [2, 3, 4]
    assert (
        sorted(HARDNESS[n] for n in made.get_sample_based_on_metric_value("hard", 0, 10)) == [0] * 4
    )
    assert all(HARDNESS[n] < 4 for n in next(iter(made)))  # step 1: 20 + 80 / 4 percent


def test_a_run_that_is_resumed_sees_what_it_would_have_seen(measured, tmp_path):
    metrics = {"hard": metric(measured, "hard", 2, 9), "long": metric(measured, "long", 3, 7)}
    first = sampler(section(tmp_path, **metrics), accumulation=4)
    running = iter(first)
    for _ in range(9):  # in the middle of a step
        next(running)
    state = first.state_dict()
    expected = [next(running) for _ in range(12)]
    again = sampler(section(tmp_path, **metrics), accumulation=4)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert [batch for batch, _ in zip(again, range(12), strict=False)] == expected
    wider = sampler(section(tmp_path, **metrics), micro=6, accumulation=4)
    wider.load_state_dict(state)
    assert next(iter(wider)) == [n for batch in expected[:3] for n in batch]


def test_a_state_without_the_history_of_clusters_goes_on(measured, tmp_path):
    config = section(tmp_path, hard=metric(measured, "hard", 2, 9))
    made = sampler(config)
    for _, _ in zip(range(3), made, strict=False):
        pass
    state = {key: value for key, value in made.state_dict().items() if "rounds" not in key}
    state["data_cluster_difficulties"] = None
    other = sampler(config)
    other.load_state_dict(state)
    next(iter(other))
    assert other.state_dict()["curriculum_step"] == made.curriculum_step + 1
    assert other.state_dict()["data_cluster_paths"] == made.state_dict()["data_cluster_paths"] + [
        "cluster_hard9"
    ]


def test_a_sampler_that_cannot_work_is_refused(measured, tmp_path):
    def refused(match, error=ValueError, **changes):
        with pytest.raises(error, match=match):
            next(iter(sampler(section(tmp_path, hard=metric(measured, "hard", 2, 9) | changes))))

    refused("clustering_type", clustering_type="many")
    refused("difficulty_type", difficulty_type="rank")
    refused("do not belong", index_to_metric_path=str(measured / "long" / "long_index_to_metric"))
    refused("easy enough", min_difficulty=-9, max_difficulty=-5)
    with pytest.raises(AssertionError, match="curriculum_metrics"):
        sampler(section(tmp_path))
    small = DeepSpeedDataSampler(
        section(tmp_path, hard=metric(measured, "hard", 9, 9)), 10, 2, 0, 1, None, 1, 0
    )
    with pytest.raises(ValueError, match="another dataset"):
        next(iter(small))


# ------------------------------------------------------------------ with an engine


def start(folder, measured, workers=0):
    config = section(folder, hard=metric(measured, "hard", 2, 9) | {"schedule_type": "custom"})
    config["data_sampling"]["num_workers"] = workers
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    data = torch.utils.data.TensorDataset(torch.arange(float(COUNT))[:, None])
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=data,
        config={
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
            "data_efficiency": config,
        },
    )
    engine.set_custom_curriculum_learning_schedule({"hard": lambda step: min(2 + step, 9)})
    return engine, loader


def test_an_engine_draws_by_its_curriculum_and_goes_on_from_a_checkpoint(measured, tmp_path):
    engine, loader = start(tmp_path, measured)
    assert len(loader) == COUNT and loader.curriculum_learning_enabled
    told = []

    def look(batch, state):
        told.append(state["current_difficulties"]["hard"])
        return batch

    engine.set_data_post_process_func(look)

    def train(engine, batches, count):
        seen = []
        for _ in range(count):
            (x,) = next(batches)
            seen.append(x.flatten().int().tolist())
            engine.backward(engine(x).mean())
            engine.step()
        return seen

    batches = iter(loader)
    train(engine, batches, 5)
    assert told == [3, 3, 4, 4, 5]
    engine.save_checkpoint(str(tmp_path / "saved"))
    expected = train(engine, batches, 6)
    assert all(HARDNESS[n] <= told[5 + at] for at, batch in enumerate(expected) for n in batch)
    other, again = start(tmp_path, measured)
    other.load_checkpoint(str(tmp_path / "saved"))
    assert train(other, iter(again), 6) == expected


def test_batches_that_are_made_ahead_do_not_count_as_given(measured, tmp_path):
    _, loader = start(tmp_path, measured)
    expected = [x.flatten().tolist() for (x,), _ in zip(loader, range(6), strict=False)]
    _, ahead = start(tmp_path, measured)
    sampler_ahead = ahead.data_sampler
    iter(ahead)
    ahead.data = iter([next(ahead.data) for _ in range(4)])  # what worker processes do
    got = [next(ahead)[0].flatten().tolist() for _ in range(2)]
    assert sampler_ahead.state_dict()["consumed_samples"] == 4
    got += [x.flatten().tolist() for (x,), _ in zip(ahead, range(4), strict=False)]
    assert got == expected
