# SPDX-License-Identifier: Apache-2.0
"""The degrees of parallelism of a checkpoint, and which of its shards each rank of a smaller run takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.errors import explain
from .constants import (
    CHECKPOINT_PP_DEGREE,
    CHECKPOINT_TP_DEGREE,
    LAYER_FILE_PREFIX,
    MODEL_FILE_PREFIX,
)
from .format import Model
from .reader import load_file, own_memory
from .reshape_meg_2d import fold, meg_2d_parallel_map
from .reshape_utils import (
    basic_folder_validation,
    check,
    get_files,
    get_files_with_prefix,
    get_zero_files,
    partition_data,
)


class model_3d_desc:
    """Degrees of parallelism.

    Args:
        pp_degree: pipeline stages.
        tp_degree: ranks that cut single parameters.
        dp_degree: ranks that share the optimizer's states.
    """

    def __init__(self, pp_degree: int = 1, tp_degree: int = 1, dp_degree: int = 1) -> None:
        self.pp_degree = pp_degree
        self.tp_degree = tp_degree
        self.dp_degree = dp_degree

    def reshape(
        self, target_3d_desc: model_3d_desc, verbose: bool = False
    ) -> list[meg_2d_parallel_map]:
        """For each data-parallel rank of the target, the numbers of the shards that each place takes.

        Raises:
            AssertionError: the target is larger, or does not divide.
        """
        possible, errors = self.can_reshape(target_3d_desc)
        check(possible, ",".join(errors))
        size = self.pp_degree * self.tp_degree
        grid = meg_2d_parallel_map(self.pp_degree, self.tp_degree)
        grid.simple_init()
        grid.map = {
            key: [numbers[0] + d * size for d in range(self.dp_degree)]
            for key, numbers in grid.map.items()
        }
        final = fold(grid, target_3d_desc.pp_degree, target_3d_desc.tp_degree, verbose)
        return _split_over_data_ranks(final, target_3d_desc.dp_degree)

    def get_desc(self) -> str:
        """The degrees in words."""
        return f"PP,TP,DP = ({self.pp_degree}, {self.tp_degree}, {self.dp_degree})"

    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp_degree * self.tp_degree * self.dp_degree

    def is_valid(self, pp_index: int, tp_index: int, dp_index: int) -> tuple[bool, list[str]]:
        """Whether there is such a rank, and what speaks against it."""
        given = (
            ("PP", pp_index, self.pp_degree),
            ("TP", tp_index, self.tp_degree),
            ("DP", dp_index, self.dp_degree),
        )
        errors = [
            f"{name} indexing error: index {index} >= degree {degree}"
            for name, index, degree in given
            if index >= degree
        ]
        return not errors, errors

    def can_reshape(self, target_3d_desc: model_3d_desc) -> tuple[bool, list[str]]:
        """Whether every degree of the target is at most this one's, and what speaks against it."""
        errors = [
            f"Expansion reshape not supported - {name}: {mine} ---> {theirs}"
            for name, mine, theirs in (
                ("PP", self.pp_degree, target_3d_desc.pp_degree),
                ("TP", self.tp_degree, target_3d_desc.tp_degree),
                ("DP", self.dp_degree, target_3d_desc.dp_degree),
            )
            if theirs > mine
        ]
        return not errors, errors


def _split_over_data_ranks(grid: meg_2d_parallel_map, dp_degree: int) -> list[meg_2d_parallel_map]:
    maps = [meg_2d_parallel_map(grid.pp_degree, grid.tp_degree) for _ in range(dp_degree)]
    for p in range(grid.pp_degree):
        for t in range(grid.tp_degree):
            for made, part in zip(
                maps, partition_data(grid.get_data(p, t), dp_degree), strict=True
            ):
                made.add_data(p, t, part)
    return maps


def model_state_metadata(paths: Sequence[str]) -> list[dict[str, Any]]:
    """What files of model states say besides weights and optimizer states."""
    without = (Model.MODULE, Model.OPTIMIZER)
    found = []
    for path in paths:
        content = load_file(path)
        found.append({k: own_memory(v) for k, v in content.items() if k not in without})
    return found


def get_model_3d_descriptor(
    dir: str | os.PathLike[str], metadata: Sequence[Mapping[str, Any]] | None = None
) -> model_3d_desc:
    """The degrees of a tag folder: as its model states say, else told from the number of files of each kind.

    Args:
        dir: the folder.
        metadata: `model_state_metadata` of its files `mp_rank_*`; None reads them.

    Raises:
        RuntimeError: the files of model states contradict each other.
    """
    basic_folder_validation(dir)
    files = get_files(dir)
    models = get_files_with_prefix(files, MODEL_FILE_PREFIX)
    shards = len(get_zero_files(dir))
    metadata = model_state_metadata(models) if metadata is None else metadata
    said = _degrees(models, [model.get(Model.PARALLEL_DIMENSIONS) for model in metadata])
    if said is not None:
        pp, tp = said
    else:
        tp = len(get_files_with_prefix(files, f"{LAYER_FILE_PREFIX}01")) or max(1, len(models))
        pp = max(1, len(models) // tp)
    return model_3d_desc(pp, tp, max(1, shards // (pp * tp)))


def _degrees(models: Sequence[str], said: Sequence[Any]) -> tuple[int, int] | None:
    """What all files say, None where none does."""
    if not any(said):
        return None
    if lacking := [os.path.basename(m) for m, one in zip(models, said, strict=True) if not one]:
        raise RuntimeError(
            explain(
                f"{Model.PARALLEL_DIMENSIONS} is missing from model-state files",
                got=f"none in {', '.join(lacking)}",
                expected="the same in each",
                fix="The files are of different saves: bring those of one together.",
            )
        )
    pairs = [(int(one[CHECKPOINT_PP_DEGREE]), int(one[CHECKPOINT_TP_DEGREE])) for one in said]
    if len(set(pairs)) > 1:
        raise RuntimeError(
            explain(
                f"{Model.PARALLEL_DIMENSIONS} disagrees across model-state files",
                got=", ".join(f"pp {pp} tp {tp}" for pp, tp in pairs),
                expected="the same in each",
                fix="The files are of different saves: bring those of one together.",
            )
        )
    return pairs[0]
