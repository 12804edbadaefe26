# SPDX-License-Identifier: Apache-2.0
"""The optimizer shards of a tag folder, read by the ranks of a run with fewer of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .format import Optim, Zero
from .reader import load_file, own_memory
from .reshape_3d_utils import get_model_3d_descriptor, model_3d_desc
from .reshape_utils import basic_folder_validation, check, get_zero_files, merge_state


class ZeROCheckpoint:
    """The shards of stages 1 and 2 in a folder.

    Args:
        dir: a tag's folder.
        source_3d: its degrees; None tells them from its files.

    Raises:
        AssertionError: the folder holds no shards, or another number of them.
    """

    def __init__(self, dir: str | os.PathLike[str], source_3d: model_3d_desc | None = None) -> None:
        basic_folder_validation(dir)
        self.dir = dir
        self.file_list = get_zero_files(dir)
        self.num_files = len(self.file_list)
        check(self.num_files > 0, f"No ZeRO files found in {dir}")
        self.src_3d = get_model_3d_descriptor(dir) if source_3d is None else source_3d
        self.target_3d = model_3d_desc(
            self.src_3d.pp_degree, self.src_3d.tp_degree, self.src_3d.dp_degree
        )
        self._3d_file_map = self.src_3d.reshape(self.target_3d)

    def get_src_world_size(self) -> int:
        """Number of ranks that saved."""
        return self.src_3d.world_size()

    def get_src_tp_degree(self) -> int:
        return self.src_3d.tp_degree

    def get_src_pp_degree(self) -> int:
        return self.src_3d.pp_degree

    def get_src_dp_degree(self) -> int:
        return self.src_3d.dp_degree

    def get_file_indices_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[int]:
        """Numbers of the files that a rank of the target takes.

        Raises:
            AssertionError: there is no such rank.
        """
        check(
            dp_index < len(self._3d_file_map),
            f"DP index {dp_index} >= DP degree {len(self._3d_file_map)}",
        )
        return self._3d_file_map[dp_index].get_data(pp_index, tp_index)

    def get_files_for_rank(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        """Paths of the files that a rank of the target takes."""
        indices = self.get_file_indices_for_rank(pp_index, tp_index, dp_index)
        return [self.file_list[index] for index in indices]

    def get_state_for_rank(
        self,
        pp_index: int,
        tp_index: int,
        dp_index: int,
        keys_to_ignore: Sequence[str] = (),
        strip_tensor_paddings: bool = True,
    ) -> dict[str, Any]:
        """What a rank of the target takes, its files' flat tensors end to end.

        Args:
            pp_index, tp_index, dp_index: the rank.
            keys_to_ignore: entries of the files to leave out.
            strip_tensor_paddings: take the padding out of optimizer states (masters have none).
        """
        merged: dict[str, Any] | None = None
        files = self.get_files_for_rank(pp_index, tp_index, dp_index)
        for path in files:
            content = own_memory(load_file(path))
            for key in keys_to_ignore:
                content.pop(key, None)
            if len(files) > 1:  # addresses inside the single shards
                content[Optim.STATE].pop(Zero.SLICE_MAPPINGS, None)
            if strip_tensor_paddings:
                _strip_padding(content[Optim.STATE])
            merged = content if merged is None else merge_state(merged, content)
        check(merged is not None, "no files for this rank")
        assert merged is not None
        if self.target_3d.dp_degree != self.src_3d.dp_degree:
            state = merged[Optim.STATE]
            state[Zero.PARTITION_COUNT] = _like(
                state[Zero.PARTITION_COUNT], self.target_3d.dp_degree
            )
            if strip_tensor_paddings and Zero.GROUP_PADDINGS in state:
                state[Zero.GROUP_PADDINGS] = _like(state[Zero.GROUP_PADDINGS], 0)
        return merged

    def print_3d_index_map(self, tag: str | None = None) -> None:
        """Print the numbers of each rank's files."""
        if tag:
            print(f"3D index map: {tag}")
        for d, grid in enumerate(self._3d_file_map):
            grid.print_data(f"dp = {d}")

    def print_3d_file_map(self, tag: str | None = None) -> None:
        """Print each rank's files."""
        if tag:
            print(f"3D file map: {tag}")
        for d, grid in enumerate(self._3d_file_map):
            for p in range(grid.pp_degree):
                for t in range(grid.tp_degree):
                    print(f"{p},{t},{d} => {self.get_files_for_rank(p, t, d)}")

    def reshape(self, target_3d_desc: model_3d_desc) -> None:
        """Give the shards out to the ranks of a smaller run from now on.

        Raises:
            AssertionError: it is larger, or does not divide.
        """
        self.target_3d = target_3d_desc
        self._3d_file_map = self.src_3d.reshape(target_3d_desc)


def _like(value: Any, number: int) -> Any:
    return [number] * len(value) if isinstance(value, list) else number


def _strip_padding(state: dict[str, Any]) -> None:
    """Cut the padding off element-wise optimizer states, in place."""
    paddings = state.get(Zero.GROUP_PADDINGS) or []
    inner = state.get(Zero.BASE_STATE) or {}
    states = inner.get("state", {}) if isinstance(inner, dict) else {}
    for index, padding in enumerate(paddings):
        group = states.get(index, {})
        for key, value in group.items():
            if padding and getattr(value, "ndim", 0) > 0:
                group[key] = value[: value.numel() - padding]
