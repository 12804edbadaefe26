# SPDX-License-Identifier: Apache-2.0
"""The files that an analysis of data leaves: for each metric, its value by sample, and the samples by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deepspeed.utils.errors import explain

from .indexed_dataset import MMapIndexedDataset, data_file_path
from .utils import find_fit_int_dtype, new_dataset

SINGLE = "single_value_per_sample"
ACCUMULATED = "accumulate_value_over_samples"
# a merged file has about as many entries as there are percentiles
_PERCENTILES = 100


def check_metrics(names: Any, functions: Any, types: Any, dtypes: Any) -> None:
    """Refuse lists of metrics that do not fit together.

    Raises:
        ValueError: their lengths differ, or a type is unknown.
    """
    lengths = {len(names), len(functions), len(types), len(dtypes)}
    if len(lengths) > 1:
        raise ValueError(
            explain(
                "each metric needs a name, a function, a type and a dtype",
                got=f"{len(names)}, {len(functions)}, {len(types)} and {len(dtypes)} of them",
            )
        )
    for kind in types:
        if kind not in (SINGLE, ACCUMULATED):
            raise ValueError(
                explain("unknown type of metric", got=kind, expected=f"{SINGLE} or {ACCUMULATED}")
            )


def as_integers(result: Any, metric: str) -> np.ndarray:
    """What a metric's function returned, as an array.

    Raises:
        TypeError: it is no array of integers.
    """
    array = result.detach().cpu().numpy() if hasattr(result, "detach") else np.asarray(result)
    if array.dtype.kind not in "iu":
        raise TypeError(
            explain(
                f"the function of metric {metric!r} must return integers",
                got=array.dtype,
                fix="round or scale its values; a few thousand different ones are enough",
            )
        )
    return array


def sample_ids(data: Any, count: int, first: int, indices: Any = None) -> np.ndarray:
    """The samples' numbers of a batch: what its entry "index" says, else their places in the dataset.

    Args:
        data: the batch.
        count: samples of it.
        first: place of its first one.
        indices: number of the sample at each place, where the dataset is a part of another.
    """
    if isinstance(data, dict) and "index" in data:
        return as_integers(data["index"], "index").reshape(-1)[:count].astype(np.int64)
    places = np.arange(first, first + count)
    return places if indices is None else np.asarray(indices, np.int64)[places]


def write_single(folder: str, metric: str, values: np.ndarray, ids: np.ndarray) -> None:
    """Write the four files of a metric that each sample has: ``sample_to_metric``, ``index_to_metric``, two of samples.

    Args:
        folder: the metric's folder.
        metric: its name, with which the files begin.
        values: of the samples, in the dataset's order.
        ids: the samples' numbers, in the same order.
    """
    value_dtype = find_fit_int_dtype(int(values.min()), int(values.max()))
    id_dtype = find_fit_int_dtype(0, int(ids.max()))
    prefix = str(Path(folder) / metric)
    with new_dataset(f"{prefix}_sample_to_metric", value_dtype) as made:
        made.add_numbers(values)

    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    with new_dataset(f"{prefix}_index_to_metric", value_dtype) as made:
        made.add_numbers(distinct)
    step = max(1, len(distinct) // _PERCENTILES)
    for name, bounds in (
        ("index_to_sample", starts),
        ("index_to_sample_percentile_merged", starts[::step]),
    ):
        with new_dataset(f"{prefix}_{name}", id_dtype) as made:
            made.add_items(np.split(ids[order], bounds[1:]))


def write_accumulated(folder: str, metric: str, total: np.ndarray) -> None:
    """Write the file of a metric that is summed over the samples: ``metric_value``."""
    dtype = find_fit_int_dtype(int(total.min()), int(total.max()))
    with new_dataset(str(Path(folder) / f"{metric}_metric_value"), dtype) as made:
        made.add_item_numpy(total)


def read_values(fname: str) -> np.ndarray:
    """All numbers of a dataset whose arrays have one element each.

    Raises:
        ValueError: it is no such dataset.
    """
    dataset = MMapIndexedDataset(fname)
    dataset.close()
    if not (dataset.sizes == 1).all():
        raise ValueError(explain(f"{fname} is no file of one value for each sample"))
    return np.fromfile(data_file_path(fname), dataset.dtype, len(dataset))
