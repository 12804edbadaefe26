# SPDX-License-Identifier: Apache-2.0
"""A curriculum's batches and the analysis of data, shared by two ranks."""

from __future__ import annotations

from pathlib import Path

import torch

import deepspeed
from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import DistributedDataAnalyzer
from deepspeed.runtime.data_pipeline.data_sampling.data_sampler import DeepSpeedDataSampler
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDataset

COUNT = 24


def _hardness(batch):
    return torch.tensor([(number * 7) % 6 for number in batch])


def _histogram(batch):
    return torch.bincount(_hardness(batch), minlength=6)


def _section(folder):
    at = str(Path(folder) / "hard" / "hard_index_to_")
    metric = {
        "index_to_sample_path": f"{at}sample",
        "index_to_metric_path": f"{at}metric",
        "difficulty_type": "value",
        "clustering_type": "schedule_based",
        "min_difficulty": 1,
        "max_difficulty": 5,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 3, "difficulty_step": 1},
    }
    curriculum = {"enabled": True, "curriculum_metrics": {"hard": metric}}
    return {"seed": 5, "data_sampling": {"num_epochs": 2, "curriculum_learning": curriculum}}


def _share(rank, folder):
    deepspeed.init_distributed("gloo")
    DistributedDataAnalyzer(
        range(COUNT),
        num_workers=2,
        worker_id=rank,
        batch_size=5,
        metric_names=["hard", "counts"],
        metric_functions=[_hardness, _histogram],
        metric_types=["single_value_per_sample", "accumulate_value_over_samples"],
        save_path=folder,
        collate_fn=list,
        device="cpu",
    ).run_map_reduce()

    def sampler():
        group = torch.distributed.group.WORLD
        return DeepSpeedDataSampler(_section(folder), COUNT, 2, rank, 2, group, 2, rank)

    first = sampler()
    running = iter(first)
    before = [next(running) for _ in range(3)]
    state = first.state_dict()
    after = list(running)
    again = sampler()
    again.load_state_dict(state)
    return before, after, list(again), state


def test_two_ranks_measure_and_share_what_one_would_see(ranks2, tmp_path):
    (before, after, again, state), (before2, after2, again2, _) = ranks2.run(_share, str(tmp_path))
    assert again == after and again2 == after2
    index = MMapIndexedDataset(str(tmp_path / "hard" / "hard_index_to_sample"))
    hardness = _hardness(range(COUNT)).tolist()
    expected = [[n for n in range(COUNT) if hardness[n] == value] for value in range(6)]
    assert [index[i].tolist() for i in range(6)] == expected
    index.close()
    counts = MMapIndexedDataset(str(tmp_path / "counts" / "counts_metric_value"))
    assert counts[0].tolist() == [4] * 6
    counts.close()

    alone = DeepSpeedDataSampler(_section(tmp_path), COUNT, 4, 0, 1, None, 2, 0)
    both = [a + b for a, b in zip(before + after, before2 + after2, strict=True)]
    assert list(alone) == both
    fewer = DeepSpeedDataSampler(_section(tmp_path), COUNT, 4, 0, 1, None, 2, 0)
    fewer.load_state_dict(state)  # the first rank's, as a checkpoint holds it
    assert list(fewer) == both[3:]
