# SPDX-License-Identifier: Apache-2.0
"""Batches of samples whose difficulty grows by a curriculum, over one metric or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain

from ...config_errors import ConfigAssertionError
from ..curriculum_scheduler import CurriculumScheduler
from .clusters import Clusters, Metric

_SAMPLING = "data_sampling"
_CURRICULUM = "curriculum_learning"


class DeepSpeedDataSampler:
    """A sampler of whole micro batches: it yields the samples of this rank's next one, as numbers in the dataset.

    Each step draws a global batch from the samples that are easy enough by now. The first rank of the data-parallel
    group draws and sends it to the others. The state says where a run stands, for any number of ranks and size of
    micro batch that goes on with it.

    Args:
        data_efficiency_config: the section ``data_efficiency``, with all defaults.
        one_epoch_total_samples: samples of the dataset.
        micro_batch_size: samples of a micro batch of a rank.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share the batches.
        data_parallel_group: their process group; may be None for one rank.
        gradient_accumulation_steps: micro batches of a step.
        global_rank: this process; the first one writes the clusters down.
        drop_last: leave out a last micro batch that is beyond the epochs' samples.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) no samples or no metrics.
        ValueError: an unknown type of difficulty or cluster.
    """

    yields_batches = True

    def __init__(
        self,
        data_efficiency_config: Mapping[str, Any],
        one_epoch_total_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_parallel_group: Any,
        gradient_accumulation_steps: int,
        global_rank: int,
        drop_last: bool = True,
    ) -> None:
        sampling = data_efficiency_config[_SAMPLING]
        section = sampling[_CURRICULUM]
        if one_epoch_total_samples <= 0 or not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigAssertionError(
                explain(
                    "a sampler needs samples, and a rank of those that share them",
                    got=f"{one_epoch_total_samples} samples, rank {data_parallel_rank} of {data_parallel_size}",
                )
            )
        self.data_efficiency_config = data_efficiency_config
        self.one_epoch_total_samples = one_epoch_total_samples
        self.total_samples = one_epoch_total_samples * sampling.get("num_epochs", 1000)
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.data_parallel_group = data_parallel_group
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.global_batch_size = (
            self.micro_batch_times_data_parallel_size * gradient_accumulation_steps
        )
        self.global_rank = global_rank
        self.drop_last = drop_last
        self.batch: list[int] = []
        self.consumed_samples = self.curriculum_step = 0
        self.current_difficulties: dict[str, int] = {}
        metrics = section.get("curriculum_metrics") or {}
        if not metrics:
            raise ConfigAssertionError(explain("a curriculum needs 'curriculum_metrics'"))
        self.curriculum_schedulers = {
            name: CurriculumScheduler(values) for name, values in metrics.items()
        }
        self._metrics = {name: Metric.of(name, values) for name, values in metrics.items()}
        self._seed = int(data_efficiency_config.get("seed", 1234))
        self.np_rng = np.random.RandomState(self._seed)
        self._clusters = self._no_clusters()
        self._history: dict[str, Any] | None = None
        self._given: dict[str, Any] | None = None
        self.loads = 0

    def _no_clusters(self) -> Clusters:
        section = self.data_efficiency_config[_SAMPLING][_CURRICULUM]
        folder = section.get("data_cluster_path") if self.global_rank == 0 else None
        metrics = list(self._metrics.values())
        return Clusters(metrics, self.one_epoch_total_samples, self._seed, folder)

    def __len__(self) -> int:
        """Samples of all epochs, for all ranks together; `num_batches` are this rank's."""
        return self.total_samples

    @property
    def num_batches(self) -> int:
        """Micro batches of this rank in all epochs."""
        full, rest = divmod(self.total_samples, self.micro_batch_times_data_parallel_size)
        return full if self.drop_last or not rest else full + 1

    def set_custom_curriculum_learning_schedule(
        self, schedule_func_dict: Mapping[str, Callable[[int], int]]
    ) -> None:
        """Give metrics of the schedule "custom" their functions: from the step (the first is 1) to the difficulty."""
        for name, function in schedule_func_dict.items():
            if name in self.curriculum_schedulers:
                self.curriculum_schedulers[name].set_custom_get_difficulty(function)

    def get_start_end_idx(self, batch_len: int | None = None) -> tuple[int, int]:
        """This rank's part of a micro batch of all ranks (of another length, if one is given)."""
        size = self.micro_batch_times_data_parallel_size if batch_len is None else batch_len
        rank, ranks = self.data_parallel_rank, self.data_parallel_size
        return round(rank * size / ranks), round((rank + 1) * size / ranks)

    def get_sample_based_on_metric_value(
        self, metric: str, value_start: float, value_end: float
    ) -> np.ndarray:
        """Samples whose value is above `value_start` and not above `value_end`."""
        return self._metrics[metric].between(value_start, value_end)

    def get_sample_based_on_metric_percentile(
        self, metric: str, percentile_start: float, percentile_end: float
    ) -> np.ndarray:
        """Samples between two percentiles of the different values, the easiest first."""
        return self._metrics[metric].between(percentile_start, percentile_end)

    def get_next_global_batch(self) -> None:
        """Draw the samples of the next step behind those in `batch`."""
        self.curriculum_step += 1
        self.current_difficulties = {
            name: scheduler.update_difficulty(self.curriculum_step)
            for name, scheduler in self.curriculum_schedulers.items()
        }
        drawn = torch.zeros(self.global_batch_size, dtype=torch.int64, device="cpu")
        if self.data_parallel_rank == 0:
            self._rebuild()
            self._clusters.admit(self.current_difficulties)
            drawn = torch.from_numpy(self._clusters.draw(self.global_batch_size, self.np_rng))
        if self.data_parallel_size > 1:
            group = self.data_parallel_group
            device = (
                "cpu"
                if dist.get_backend(group) == "gloo"
                else get_accelerator().current_device_name()
            )
            drawn = drawn.to(device)
            dist.broadcast(drawn, src=dist.get_global_rank(group, 0), group=group)
        self.batch += drawn.tolist()

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_times_data_parallel_size
        while self.consumed_samples + (step if self.drop_last else 1) <= self.total_samples:
            while len(self.batch) < step:
                self.get_next_global_batch()
            current, self.batch = self.batch[:step], self.batch[step:]
            self.consumed_samples += step
            start, end = self.get_start_end_idx()
            yield current[start:end]

    # - state

    def note_given(self, state: dict[str, Any]) -> None:
        """Have `state_dict` return this state, from before batches that worker processes make ahead."""
        self._given = state

    def live_state(self) -> dict[str, Any]:
        """Where the sampler stands, batches that are made ahead counted as given."""
        kind, keys, *rest = self.np_rng.get_state()
        clusters = self._clusters
        history = self._history or {
            "data_cluster_paths": list(clusters.names),
            "data_cluster_current_position": list(clusters.positions),
            "data_cluster_rounds": list(clusters.rounds),
            "data_cluster_difficulties": [dict(admitted) for admitted in clusters.history],
        }
        return {
            "batch": list(self.batch),
            "consumed_samples": self.consumed_samples,
            "curriculum_step": self.curriculum_step,
            "current_difficulties": dict(self.current_difficulties),
            **history,
            "np_rng_state": (str(kind), np.asarray(keys).tolist(), *rest),
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: what `load_state_dict` takes."""
        return self.live_state() if self._given is None else self._given

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another sampler stood; its number of ranks and micro batch may be others.

        A state of upstream's sampler gives the step and the samples that were given; the orders are then new.
        """
        self._given = None
        self.loads += 1
        self.batch = [int(sample) for sample in state_dict["batch"]]
        self.consumed_samples = int(state_dict["consumed_samples"])
        self.curriculum_step = int(state_dict["curriculum_step"])
        self.current_difficulties = dict(state_dict["current_difficulties"])
        for name, difficulty in self.current_difficulties.items():
            if name in self.curriculum_schedulers:
                self.curriculum_schedulers[name].set_current_difficulty(difficulty)
        kind, keys, *rest = state_dict["np_rng_state"]
        self.np_rng.set_state((kind, np.asarray(keys, np.uint32), *rest))
        names = list(state_dict["data_cluster_paths"])
        self._history = {
            "data_cluster_paths": names,
            "data_cluster_current_position": [
                int(at) for at in state_dict["data_cluster_current_position"]
            ],
            "data_cluster_rounds": list(state_dict.get("data_cluster_rounds") or [0] * len(names)),
            "data_cluster_difficulties": state_dict.get("data_cluster_difficulties"),
        }

    def _rebuild(self) -> None:
        """Make the clusters of a loaded state; late, because custom schedules may be given after loading."""
        if self._history is None:
            return
        history, self._history = self._history, None
        difficulties = history["data_cluster_difficulties"]
        if difficulties is None:
            difficulties = [
                {
                    name: scheduler.get_difficulty(step)
                    for name, scheduler in self.curriculum_schedulers.items()
                }
                for step in range(1, self.curriculum_step)
            ]
        self._clusters = self._no_clusters()
        self._clusters.restore(
            difficulties,
            history["data_cluster_current_position"],
            history["data_cluster_rounds"],
        )
