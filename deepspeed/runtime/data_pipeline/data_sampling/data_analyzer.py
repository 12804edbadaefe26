# SPDX-License-Identifier: Apache-2.0
"""Measuring every sample of a dataset ahead of training, so that a curriculum can choose by what was measured.

A map over shares of the dataset, in processes of this machine and on any number of machines, and a reduction that
joins their files. `DistributedDataAnalyzer` does both at once on the ranks of a job and keeps the parts in memory.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

from deepspeed import comm as dist
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from . import metric_files
from .dataset_files import numpy_dtype
from .indexed_dataset import MMapIndexedDataset
from .metric_files import SINGLE
from .utils import new_dataset, split_dataset

# what is known of one metric after a part of the samples: values and numbers of samples, or a sum
Results = list[dict[str, Any]]


class DataAnalyzer:
    """Map and reduce over a dataset: each metric's values, in files below `save_path`.

    A metric of type "single_value_per_sample" gives an integer for each sample of a batch; its files end in
    ``_sample_to_metric``, ``_index_to_metric``, ``_index_to_sample`` and ``_index_to_sample_percentile_merged``. One
    of type "accumulate_value_over_samples" gives an array that is summed over the batches, in ``_metric_value``.

    Args:
        dataset: map-style dataset.
        num_workers: machines (or calls of `run_map`) that share the dataset.
        worker_id: which of them this is.
        num_threads: processes of this one; functions that cannot be sent to processes run in threads.
        num_threads_reduce: has no effect: one process joins the files.
        specific_threads: only these of the processes' shares; none means all.
        batch_size: samples that the functions see at a time.
        metric_names: names, which become folders.
        metric_functions: from a batch to integers, each.
        metric_types: one of the two above, each.
        metric_dtypes: integer dtypes (numpy or torch) that the values fit into, each.
        save_path: folder of the results.
        collate_fn: makes a batch of samples; None is torch's default. An entry "index" of a batch that is a dict
            holds the samples' numbers; without it they are the places in the dataset.
        custom_map_init: replaces `init_metric_results`, with its arguments.
        custom_map_update: replaces `update_metric_results`.
        custom_map_finalize: replaces `finalize_metric_results`.
        custom_reduce: replaces `merge_map_results`.
        sample_indices: the number of the sample at each place, where the dataset is a part of another.

    Raises:
        ValueError: the lists of metrics do not fit together.
    """

    def __init__(
        self,
        dataset: Any,
        num_workers: int = 1,
        worker_id: int = 0,
        num_threads: int = 1,
        num_threads_reduce: int = 1,
        specific_threads: Sequence[int] = (),
        batch_size: int = 1,
        metric_names: Sequence[str] = (),
        metric_functions: Sequence[Callable[..., Any]] = (),
        metric_types: Sequence[str] = (),
        metric_dtypes: Sequence[Any] = (),
        save_path: str = "./",
        collate_fn: Callable[..., Any] | None = None,
        custom_map_init: Callable[..., Any] | None = None,
        custom_map_update: Callable[..., None] | None = None,
        custom_map_finalize: Callable[..., None] | None = None,
        custom_reduce: Callable[..., None] | None = None,
        sample_indices: Sequence[int] | None = None,
    ) -> None:
        metric_files.check_metrics(metric_names, metric_functions, metric_types, metric_dtypes)
        self.dataset = dataset
        self.num_workers, self.worker_id = num_workers, worker_id
        self.num_threads, self.num_threads_reduce = num_threads, num_threads_reduce
        self.specific_threads = list(specific_threads)
        self.batch_size = batch_size
        self.metric_names, self.metric_functions = list(metric_names), list(metric_functions)
        self.metric_types, self.metric_dtypes = list(metric_types), list(metric_dtypes)
        self.save_path = str(save_path)
        self.collate_fn = collate_fn
        self.custom_map_init = custom_map_init
        self.custom_map_update = custom_map_update
        self.custom_map_finalize = custom_map_finalize
        self.custom_reduce = custom_reduce
        self.sample_indices = sample_indices

    # - map

    def _part(self, metric_name: str, worker: int, thread: int, save_path: str) -> str:
        folder = Path(save_path) / metric_name / f"worker{worker}_thread{thread}"
        return str(folder / metric_name)

    def init_metric_results(
        self,
        thread_id: int,
        metric_names: Sequence[str],
        metric_types: Sequence[str],
        metric_dtypes: Sequence[Any],
        save_path: str,
        worker_id: int,
    ) -> Results:
        """What the other two methods of the map fill: for each metric, the place of its files and no values."""
        return [
            {"fname": self._part(name, worker_id, thread_id, save_path), **_nothing(name)}
            for name in metric_names
        ]

    def update_metric_results(
        self,
        data: Any,
        metric_types: Sequence[str],
        metric_dtypes: Sequence[Any],
        metric_functions: Sequence[Callable[..., Any]],
        metric_results: Results,
        batch_start_idx: int = 0,
    ) -> None:
        """Add the values of a batch, whose first sample is at place `batch_start_idx`."""
        _add_batch(
            metric_results,
            metric_types,
            metric_functions,
            data,
            batch_start_idx,
            self.sample_indices,
        )

    def finalize_metric_results(
        self, metric_types: Sequence[str], metric_dtypes: Sequence[Any], metric_results: Results
    ) -> None:
        """Write this part's files."""
        for kind, dtype, result in zip(metric_types, metric_dtypes, metric_results, strict=True):
            fname = result["fname"]
            if kind == SINGLE:
                values, ids = _joined(result)
                _check_fit(values, dtype, result["metric"])
                with new_dataset(f"{fname}_sample_to_metric", dtype) as made:
                    made.add_numbers(values)
                with new_dataset(f"{fname}_sample_ids", np.int64) as made:
                    made.add_numbers(ids)
            elif result["total"] is not None:
                _check_fit(result["total"], dtype, result["metric"])
                with new_dataset(f"{fname}_metric_value", dtype) as made:
                    made.add_item_numpy(result["total"])

    def run_map_helper(self, thread_id: int) -> None:
        """Map one process's share."""
        lists = (self.metric_types, self.metric_dtypes)
        begin = self.custom_map_init or self.init_metric_results
        results = begin(thread_id, self.metric_names, *lists, self.save_path, self.worker_id)
        update = self.custom_map_update or self.update_metric_results
        for first, data in _batches(self, thread_id):
            update(data, *lists, self.metric_functions, results, first)
        (self.custom_map_finalize or self.finalize_metric_results)(*lists, results)

    def run_map(self) -> None:
        """Map this worker's share; its files are then below `save_path`."""
        threads = self.specific_threads or list(range(self.num_threads))
        if len(threads) == 1:
            self.run_map_helper(threads[0])
            return
        with _pool(len(threads), self) as pool:
            list(pool.map(self.run_map_helper, threads))

    # - reduce

    def merge_map_results(
        self,
        dataset: Any,
        metric_names: Sequence[str],
        metric_types: Sequence[str],
        save_path: str,
        num_workers: int,
        num_threads: int,
        num_threads_reduce: int,
    ) -> None:
        """Join the files of all workers.

        Raises:
            FileNotFoundError: a worker's map has not run.
        """
        parts = [(worker, thread) for worker in range(num_workers) for thread in range(num_threads)]
        for name, kind in zip(metric_names, metric_types, strict=True):
            fnames = [self._part(name, *part, save_path) for part in parts]
            folder = str(Path(save_path) / name)
            if kind == SINGLE:
                values = [metric_files.read_values(f"{at}_sample_to_metric") for at in fnames]
                ids = [metric_files.read_values(f"{at}_sample_ids") for at in fnames]
                metric_files.write_single(folder, name, np.concatenate(values), np.concatenate(ids))
                continue
            total: Any = None
            for at in fnames:
                if MMapIndexedDataset.exists(f"{at}_metric_value"):  # none where it had no sample
                    part = MMapIndexedDataset(f"{at}_metric_value")
                    total = part[0].astype(np.int64) + (0 if total is None else total)
                    part.close()
            if total is None:
                raise FileNotFoundError(explain(f"no worker has mapped {name!r}", got=fnames[0]))
            metric_files.write_accumulated(folder, name, total)

    def run_reduce(self) -> None:
        """Join what the workers' `run_map` has left; one of them calls it, after all are done."""
        (self.custom_reduce or self.merge_map_results)(
            self.dataset,
            self.metric_names,
            self.metric_types,
            self.save_path,
            self.num_workers,
            self.num_threads,
            self.num_threads_reduce,
        )

    def run_map_reduce(self, comm_group: Any = None) -> None:
        """Map on every rank and reduce on the first; `worker_id` is the rank, and the folder is one that all see."""
        self.run_map()
        if self.num_workers > 1:
            dist.barrier(group=comm_group)
        if self.worker_id == 0:
            self.run_reduce()
        if self.num_workers > 1:
            dist.barrier(group=comm_group)

    def get_metric_value_percentiles(
        self, metric_name: str, num_sample_per_value: dict[int, int], total_num_samples: int
    ) -> dict[int, int]:
        """The metric's value at each percentile of the samples; logged as well.

        Args:
            metric_name: for the log.
            num_sample_per_value: samples of each value.
            total_num_samples: all of them.

        Returns:
            Percentile (0, 5, ..., 100) -> the least value that this share of the samples does not exceed.
        """
        values = sorted(num_sample_per_value)
        shares = np.cumsum([num_sample_per_value[value] for value in values]) * 100
        found = {}
        for percentile in range(0, 101, 5):
            place = int(np.searchsorted(shares, percentile * total_num_samples))
            found[percentile] = values[min(place, len(values) - 1)]
        logger.info(f"percentiles of {metric_name}: {found}")
        return found


class DistributedDataAnalyzer:
    """The analysis of `DataAnalyzer` on the ranks of a job, without files in between.

    Args:
        dataset: map-style dataset, the same on all ranks.
        num_workers: ranks of `comm_group`.
        num_threads: processes of each rank.
        worker_id: this rank in the group.
        batch_size: as in `DataAnalyzer`, like the next five.
        metric_names: names, which become folders.
        metric_functions: from a batch to integers, each.
        metric_types: "single_value_per_sample" or "accumulate_value_over_samples", each.
        save_path: folder of the results; the first rank writes.
        collate_fn: makes a batch of samples.
        device: where the ranks' numbers lie while they travel: "cpu" for gloo, else the backend's device.
        comm_group: the ranks; None is all.
        sample_indices: the number of the sample at each place, where the dataset is a part of another.

    Raises:
        ValueError: the lists of metrics do not fit together, or `num_workers` is not the group's size.
    """

    def __init__(
        self,
        dataset: Any,
        num_workers: int = 1,
        num_threads: int = 1,
        worker_id: int = 0,
        batch_size: int = 1,
        metric_names: Sequence[str] = (),
        metric_functions: Sequence[Callable[..., Any]] = (),
        metric_types: Sequence[str] = (),
        save_path: str = "./",
        collate_fn: Callable[..., Any] | None = None,
        device: str = "cuda",
        comm_group: Any = None,
        sample_indices: Sequence[int] | None = None,
    ) -> None:
        metric_files.check_metrics(metric_names, metric_functions, metric_types, metric_names)
        joined = dist.get_world_size(comm_group) if dist.is_initialized() else 1
        if num_workers != joined:
            raise ValueError(
                explain("one worker for each rank of the group", got=num_workers, expected=joined)
            )
        self.dataset = dataset
        self.num_workers, self.worker_id, self.num_threads = num_workers, worker_id, num_threads
        self.batch_size = batch_size
        self.metric_names, self.metric_functions = list(metric_names), list(metric_functions)
        self.metric_types = list(metric_types)
        self.save_path = str(save_path)
        self.collate_fn = collate_fn
        self.device = torch.device(device)
        self.comm_group = comm_group
        self.sample_indices = sample_indices

    def run_map_helper(self, thread_id: int = 0, metric_queues: Any = None) -> Results:
        """Map one process's share and return its values."""
        results = [_nothing(name) for name in self.metric_names]
        for first, data in _batches(self, thread_id):
            _add_batch(
                results, self.metric_types, self.metric_functions, data, first, self.sample_indices
            )
        return results

    def run_map_reduce(self) -> None:
        """Measure the dataset; when this returns, the first rank has written the files."""
        if self.num_threads == 1:
            parts = [self.run_map_helper(0)]
        else:
            group, self.comm_group = self.comm_group, None  # it cannot be sent to processes
            try:
                with _pool(self.num_threads, self) as pool:
                    parts = list(pool.map(self.run_map_helper, range(self.num_threads)))
            finally:
                self.comm_group = group
        for number, (name, kind) in enumerate(
            zip(self.metric_names, self.metric_types, strict=True)
        ):
            mine = [part[number] for part in parts]
            folder = str(Path(self.save_path) / name)
            if kind == SINGLE:
                pairs = [_joined(part) for part in mine]
                values = self._gathered(np.concatenate([pair[0] for pair in pairs]))
                ids = self._gathered(np.concatenate([pair[1] for pair in pairs]))
                if self.worker_id == 0:
                    metric_files.write_single(
                        folder, name, np.concatenate(values), np.concatenate(ids)
                    )
                continue
            sums = [part["total"] for part in mine if part["total"] is not None]
            own = np.sum(sums, axis=0) if sums else np.empty(0, np.int64)
            totals = [total for total in self._gathered(own) if total.size]
            if self.worker_id == 0:
                metric_files.write_accumulated(folder, name, np.sum(totals, axis=0))
        if self.num_workers > 1:
            dist.barrier(group=self.comm_group)

    def _gathered(self, mine: np.ndarray) -> list[np.ndarray]:
        """The arrays of all ranks, on the first one; elsewhere only this rank's."""
        if self.num_workers == 1:
            return [mine]
        group = self.comm_group
        own = torch.from_numpy(mine.astype(np.int64)).flatten().to(self.device)
        sizes = [
            torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.num_workers)
        ]
        dist.all_gather(sizes, torch.tensor([own.numel()], device=self.device), group=group)
        if self.worker_id != 0:
            if own.numel():
                dist.send(own, dist.get_global_rank(group, 0), group=group)
            return [mine]
        found = [mine]
        for source in range(1, self.num_workers):
            part = torch.empty(int(sizes[source]), dtype=torch.int64, device=self.device)
            if part.numel():
                dist.recv(part, dist.get_global_rank(group, source), group=group)
            found.append(part.cpu().numpy())
        return found


def _nothing(metric: str) -> dict[str, Any]:
    return {"metric": metric, "values": [], "ids": [], "total": None}


def _add_batch(
    results: Results,
    kinds: Sequence[str],
    functions: Sequence[Callable[..., Any]],
    data: Any,
    first: int,
    indices: Any,
) -> None:
    for kind, function, result in zip(kinds, functions, results, strict=True):
        array = metric_files.as_integers(function(data), result["metric"])
        if kind == SINGLE:
            result["values"].append(array.reshape(-1))
            result["ids"].append(metric_files.sample_ids(data, array.size, first, indices))
        else:
            result["total"] = array if result["total"] is None else result["total"] + array


def _joined(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    none = np.empty(0, np.int64)
    return np.concatenate(result["values"] or [none]), np.concatenate(result["ids"] or [none])


def _check_fit(values: np.ndarray, dtype: Any, metric: str) -> None:
    limits = np.iinfo(numpy_dtype(dtype))
    if values.size and not (limits.min <= values.min() and values.max() <= limits.max):
        raise OverflowError(
            explain(
                f"values of metric {metric!r} do not fit into its dtype",
                got=f"{values.min()} to {values.max()}",
                expected=f"{limits.min} to {limits.max}",
                fix="name a wider one in metric_dtypes",
            )
        )


def _batches(job: DataAnalyzer | DistributedDataAnalyzer, thread_id: int) -> Any:
    """The batches of one process's share, each with the place of its first sample."""
    shares = split_dataset(job.dataset, job.num_workers, job.worker_id, job.num_threads)[1]
    places = range(*shares[thread_id])
    part = Subset(job.dataset, places)
    sampler = BatchSampler(SequentialSampler(part), job.batch_size, drop_last=False)
    loader = DataLoader(part, batch_sampler=sampler, collate_fn=job.collate_fn)
    return zip(places[:: job.batch_size], loader, strict=True)


def _pool(count: int, job: Any) -> Executor:
    """Processes, or threads where the dataset or a function (a nested one, for example) cannot be sent to a process."""
    try:
        pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        logger.warning(f"the data is analyzed in threads, not in processes: {error}")
        return ThreadPoolExecutor(count)
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
