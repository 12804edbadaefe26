# SPDX-License-Identifier: Apache-2.0
"""Samples grouped by the difficulty at which a curriculum admits them, and drawing from the groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepspeed.utils.errors import explain

from ...config_errors import ConfigValueError
from .indexed_dataset import MMapIndexedDataset
from .utils import find_fit_int_dtype, new_dataset

VALUE, PERCENTILE = "value", "percentile"
SINGLE_CLUSTER, SCHEDULE_BASED = "single_cluster", "schedule_based"


@dataclass(frozen=True)
class Metric:
    """One difficulty metric of ``curriculum_metrics``, with the files in which samples lie by their difficulty."""

    name: str
    difficulty_type: str
    clustering_type: str
    samples: MMapIndexedDataset | None
    """Sample numbers, from the easiest to the most difficult; None where nothing is chosen by this metric."""
    values: np.ndarray | None
    """The metric's value of each array of `samples`; None where difficulties are percentiles."""

    @staticmethod
    def of(name: str, section: Mapping[str, Any]) -> Metric:
        """Open the metric of one section.

        Raises:
            ValueError: (as ``ConfigValueError``) an unknown type, or files that do not belong together.
            FileNotFoundError: the files are not there.
        """
        difficulty = section.get("difficulty_type", VALUE)
        clustering = section.get("clustering_type", SINGLE_CLUSTER)
        for key, got, known in (
            ("difficulty_type", difficulty, (VALUE, PERCENTILE)),
            ("clustering_type", clustering, (SINGLE_CLUSTER, SCHEDULE_BASED)),
        ):
            if got not in known:
                raise ConfigValueError(
                    explain(
                        f"unknown {key} of metric {name!r}", got=got, expected=" or ".join(known)
                    )
                )
        if clustering == SINGLE_CLUSTER:
            return Metric(name, difficulty, clustering, None, None)
        samples = MMapIndexedDataset(section["index_to_sample_path"])
        if difficulty == PERCENTILE:
            return Metric(name, difficulty, clustering, samples, None)
        index = MMapIndexedDataset(section["index_to_metric_path"])
        values = np.array([index[i][0] for i in range(len(index))])
        index.close()
        if len(values) != len(samples):
            raise ConfigValueError(
                explain(
                    f"the two files of metric {name!r} do not belong together",
                    got=f"{len(samples)} arrays of samples for {len(values)} values",
                    fix="with difficulty_type 'value', index_to_sample_path must not be the percentile_merged file",
                )
            )
        return Metric(name, difficulty, clustering, samples, values)

    def place(self, difficulty: float) -> int:
        """How many arrays of samples are at most this difficult."""
        if self.values is not None:
            return int(np.searchsorted(self.values, difficulty, side="right"))
        assert self.samples is not None
        if difficulty <= 0:
            return 0
        return max(1, int(len(self.samples) * min(difficulty, 100) / 100))

    def between(self, above: float, upto: float) -> np.ndarray:
        """Numbers of the samples more difficult than `above`, and not more than `upto`."""
        assert self.samples is not None
        found = self.samples[self.place(above) : self.place(upto)]
        return np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)


class Clusters:
    """Groups of samples: each holds those that a step admitted first. Drawing takes each group's in an order of its own.

    The orders depend on the seed, the group and how often it was used up, so a state is a few numbers.

    Args:
        metrics: those that admit samples; without any, there is one group of all samples.
        total: samples of the dataset.
        seed: of the orders.
        folder: where the groups are written for a look; None writes nothing.
    """

    def __init__(
        self, metrics: Sequence[Metric], total: int, seed: int, folder: str | None = None
    ) -> None:
        self._metrics = [metric for metric in metrics if metric.clustering_type == SCHEDULE_BASED]
        self._total, self._seed, self._folder = total, seed, folder
        self._seen = np.zeros(total, bool)
        self._admitted: dict[str, float] = {}
        self._members: list[np.ndarray] = []
        self._orders: list[np.ndarray | None] = []
        self.names: list[str] = []
        self.history: list[dict[str, float]] = []
        self.positions: list[int] = []
        self.rounds: list[int] = []

    def admit(self, difficulties: Mapping[str, float]) -> None:
        """Make a group of the samples that these difficulties admit and earlier ones did not, if there are any.

        Raises:
            ValueError: a file names samples that the dataset has not, or no sample is easy enough at first.
        """
        kept = {metric.name: difficulties[metric.name] for metric in self._metrics}
        if self._admitted == kept and self.names:
            return
        self._admitted = kept
        allowed = np.ones(self._total, bool)
        for metric in self._metrics:
            ids = metric.between(-np.inf, difficulties[metric.name])
            if ids.size and ids.max() >= self._total:
                raise ConfigValueError(
                    explain(
                        f"the files of metric {metric.name!r} are of another dataset",
                        got=f"sample {ids.max()}",
                        expected=f"{self._total} samples",
                    )
                )
            easy = np.zeros(self._total, bool)
            easy[ids] = True
            allowed &= easy
        new = np.flatnonzero(allowed & ~self._seen)
        if not new.size and self.names:
            return
        if not new.size:
            raise ConfigValueError(
                explain(
                    "no sample is easy enough for the first step of the curriculum",
                    got=", ".join(f"{name} {value}" for name, value in kept.items()),
                    fix="raise min_difficulty",
                )
            )
        self._seen |= allowed
        self._members.append(new.astype(find_fit_int_dtype(0, self._total)))
        self._orders.append(None)
        self.names.append("cluster" + "".join(f"_{n}{v}" for n, v in difficulties.items()))
        self.history.append(dict(difficulties))
        self.positions.append(0)
        self.rounds.append(0)
        if self._folder is not None:
            fname = str(Path(self._folder) / self.names[-1])
            with new_dataset(fname, self._members[-1].dtype) as made:
                made.add_item_numpy(self._order(len(self.names) - 1))

    def _order(self, cluster: int) -> np.ndarray:
        order = self._orders[cluster]
        if order is None:
            rng = np.random.default_rng([self._seed, cluster, self.rounds[cluster]])
            order = self._orders[cluster] = rng.permutation(self._members[cluster])
        return order

    def draw(self, count: int, rng: np.random.RandomState) -> np.ndarray:
        """Take `count` samples, from each group about as many as its size asks for, in random order."""
        sizes = np.array([members.size for members in self._members], np.float64)
        shares = np.bincount(
            rng.choice(sizes.size, count, p=sizes / sizes.sum()), minlength=sizes.size
        )
        parts = [self._take(cluster, int(share)) for cluster, share in enumerate(shares)]
        return rng.permutation(np.concatenate(parts).astype(np.int64))

    def _take(self, cluster: int, count: int) -> np.ndarray:
        parts = [np.empty(0, np.int64)]
        while count:
            order, at = self._order(cluster), self.positions[cluster]
            part = order[at : at + count]
            parts.append(part)
            count -= part.size
            self.positions[cluster] = at + part.size
            if self.positions[cluster] >= order.size:
                self.positions[cluster] = 0
                self.rounds[cluster] += 1
                self._orders[cluster] = None
        return np.concatenate(parts)

    def restore(
        self,
        history: Sequence[Mapping[str, float]],
        positions: Sequence[int],
        rounds: Sequence[int],
    ) -> None:
        """Make the groups of these difficulties again, each used as far as it was."""
        for difficulties in history:
            self.admit(difficulties)
        for cluster, (position, turn) in enumerate(zip(positions, rounds, strict=False)):
            if cluster < len(self.names):
                self.positions[cluster] = int(position) % self._members[cluster].size
                self.rounds[cluster] = int(turn)
                self._orders[cluster] = None
