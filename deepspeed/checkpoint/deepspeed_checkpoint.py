# SPDX-License-Identifier: Apache-2.0
"""A tag folder of Megatron-DeepSpeed seen by the ranks of a run with fewer pipeline stages or tensor-parallel ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .constants import LAYER_FILE_PREFIX, MODEL_FILE_PREFIX, UNIVERSAL_CHECKPOINT_INFO
from .format import Optim
from .reader import load_file, own_memory
from .reshape_3d_utils import get_model_3d_descriptor, model_3d_desc, model_state_metadata
from .reshape_meg_2d import meg_2d_parallel_map, reshape_meg_2d_parallel
from .reshape_utils import (
    basic_folder_validation,
    check,
    get_files,
    get_files_with_prefix,
    merge_state,
    partition_data,
    validate_files,
)
from .zero_checkpoint import ZeROCheckpoint

ITERATION_KEY, ARGS_KEY, CHECKPOINT_INFO_KEY = "iteration", "args", "checkpoint_info"
EMBEDDING_LAYER_INDEX = 0
# Small weights that every tensor-parallel rank holds whole: joined slices keep the first.
_REPLICATED = (
    "layernorm.weight",
    "layernorm.bias",
    "norm.weight",
    "norm.bias",
    "dense.bias",
    "4h_to_h.bias",
)
# Weights that are cut along their second dimension.
_CUT_ALONG_ROWS = ("attention.dense.weight", "dense_4h_to_h.weight")


class DeepSpeedCheckpoint:
    """The files of a tag folder by the places of a (smaller) grid of ranks.

    Args:
        dir: the tag's folder.
        tp_degree, pp_degree, dp_degree: degrees of the reading run; None keeps the saved ones.
        final_layer_norm_idx: which of the layer files is the final norm, from the end.

    Attributes:
        model_state_metadata: what each of `mp_rank_files` says besides weights and optimizer states.

    Raises:
        AssertionError: it is no such folder, or a degree does not divide the saved one.
        RuntimeError: the files of model states contradict each other.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        tp_degree: int | None = None,
        pp_degree: int | None = None,
        dp_degree: int | None = None,
        final_layer_norm_idx: int = -1,
    ) -> None:
        basic_folder_validation(dir)
        self.final_layer_norm_idx = final_layer_norm_idx
        self.dir = dir
        self.file_list = get_files(dir)
        self.layer_files = _pipeline_layer_files(self.file_list)
        self.mp_rank_files = get_files_with_prefix(self.file_list, MODEL_FILE_PREFIX)
        check(
            bool(self.mp_rank_files),
            f"{dir} seems a bogus DeepSpeed checkpoint folder: Cannot find {MODEL_FILE_PREFIX}* files in there.",
        )
        self.model_state_metadata = model_state_metadata(self.mp_rank_files)
        self.zero_checkpoint = ZeROCheckpoint(
            dir, get_model_3d_descriptor(dir, self.model_state_metadata)
        )
        source = self.zero_checkpoint.src_3d
        self.layer_keys = _layer_keys(self.layer_files)
        self.layer_count = len(self.layer_keys)
        self.tp_degree = source.tp_degree if tp_degree is None else tp_degree
        self.pp_degree = source.pp_degree if pp_degree is None else pp_degree
        self.dp_degree = source.dp_degree if dp_degree is None else dp_degree
        self.original_world_size = source.world_size()
        self.world_size = self.tp_degree * self.pp_degree * self.dp_degree
        self.old_2d_map = meg_2d_parallel_map(source.pp_degree, source.tp_degree)
        self.old_2d_map.simple_init()
        self.new_2d_map = reshape_meg_2d_parallel(
            source.pp_degree, source.tp_degree, self.pp_degree, self.tp_degree
        )
        if self.is_change_pp_degree() or self.is_change_tp_degree() or self.is_change_dp_degree():
            self.zero_checkpoint.reshape(
                model_3d_desc(self.pp_degree, self.tp_degree, self.dp_degree)
            )
        self.global_state: dict[str, Any] = {}
        self._read_global_state()
        self.pp_to_transformer_map = self._pp_transformer_map()
        self.transformer_file_map = self._transformer_file_map()
        self.tp_to_embedding_map = self._tp_layer_map(EMBEDDING_LAYER_INDEX)
        self.tp_to_final_norm_map = self._tp_layer_map(self.final_layer_norm_idx)

    # - degrees

    def is_change_tp_degree(self) -> bool:
        """Whether the reading run has another number of tensor-parallel ranks."""
        return self.tp_degree != self.zero_checkpoint.get_src_tp_degree()

    def is_change_pp_degree(self) -> bool:
        """Whether the reading run has another number of pipeline stages."""
        return self.pp_degree != self.zero_checkpoint.get_src_pp_degree()

    def is_change_dp_degree(self) -> bool:
        """Whether the reading run has another number of data-parallel ranks."""
        return self.dp_degree != self.zero_checkpoint.get_src_dp_degree()

    # - what the model states say

    def _read_global_state(self) -> None:
        model = self.model_state_metadata[0]
        self.global_state = {
            ITERATION_KEY: model.get(ITERATION_KEY, 0),
            ARGS_KEY: model.get(ARGS_KEY),
            CHECKPOINT_INFO_KEY: model.get(CHECKPOINT_INFO_KEY),
            UNIVERSAL_CHECKPOINT_INFO: model.get(UNIVERSAL_CHECKPOINT_INFO),
        }

    def get_iteration(self) -> int:
        """The client's count of iterations, 0 where it saved none."""
        return self.global_state[ITERATION_KEY]

    def get_args(self) -> Any:
        """The client's arguments."""
        return self.global_state[ARGS_KEY]

    def get_checkpoint_info(self, info_key: str = CHECKPOINT_INFO_KEY) -> Any:
        """An entry that the client saved."""
        return self.global_state.get(info_key)

    # - optimizer shards

    def get_zero_checkpoint_state(
        self, pp_index: int, tp_index: int, dp_index: int, strip_tensor_paddings: bool = True
    ) -> dict[str, Any]:
        """A rank's optimizer state; see `ZeROCheckpoint.get_state_for_rank`."""
        return self.zero_checkpoint.get_state_for_rank(
            pp_index,
            tp_index,
            dp_index,
            keys_to_ignore=[Optim.DS_CONFIG],
            strip_tensor_paddings=strip_tensor_paddings,
        )

    def get_zero_files(self, pp_index: int, tp_index: int, dp_index: int) -> list[str]:
        """Paths of a rank's shards."""
        return self.zero_checkpoint.get_files_for_rank(pp_index, tp_index, dp_index)

    # - model states by place

    def get_2d_parallel_files(self, tp_index: int, pp_index: int) -> list[str]:
        """Paths of the model states that a place takes.

        Raises:
            AssertionError: there is no such place.
        """
        return [self.mp_rank_files[i] for i in self.new_2d_map.get_data(pp_index, tp_index)]

    def get_2d_parallel_state(self, tp_index: int, pp_index: int) -> dict[str, Any]:
        """The model states that a place takes, joined."""
        states = [
            own_memory(load_file(path)) for path in self.get_2d_parallel_files(tp_index, pp_index)
        ]
        merged = states[0]
        for state in states[1:]:
            merged = merge_state(merged, state)
        return merged

    # - layer files of pipelines

    def get_embedding_layer_id(self) -> str:
        """Name of the first layer's files."""
        return self.layer_keys[EMBEDDING_LAYER_INDEX]

    def get_final_norm_layer_id(self) -> str:
        """Name of the final norm's files."""
        return self.layer_keys[self.final_layer_norm_idx]

    def get_embedding_files(self, tp_index: int) -> list[str]:
        """Paths of the first layer's slices that a rank takes."""
        return self._files_of(self.tp_to_embedding_map, tp_index)

    def get_embedding_state(self, tp_index: int) -> dict[str, Any]:
        """The first layer's slices that a rank takes, joined."""
        return _joined_layers(self.get_embedding_files(tp_index))

    def get_final_norm_files(self, tp_index: int) -> list[str]:
        """Paths of the final norm's copies that a rank takes."""
        return self._files_of(self.tp_to_final_norm_map, tp_index)

    def get_final_norm_state(self, tp_index: int) -> dict[str, Any]:
        """The final norm (equal on all tensor-parallel ranks)."""
        return own_memory(load_file(self.get_final_norm_files(tp_index)[0]))

    def get_pp_transformer_map(self, pp_index: int) -> list[str]:
        """Names of the layers between embedding and final norm on a stage."""
        check(pp_index < self.pp_degree, f"no pipeline stage {pp_index}")
        return self.pp_to_transformer_map[pp_index]

    def get_transformer_state(self, tp_index: int, pp_index: int) -> list[dict[str, Any]]:
        """The layers of a stage, each joined of the slices that the rank takes."""
        check(tp_index < self.tp_degree and pp_index < self.pp_degree, "no such place in the grid")
        layers = self.transformer_file_map[(tp_index, pp_index)]
        return [_joined_layers(files) for files in layers]

    def _files_of(self, by_rank: Mapping[int, list[str]], tp_index: int) -> list[str]:
        check(tp_index in by_rank, f"no tensor-parallel rank {tp_index} with layer files")
        return by_rank[tp_index]

    def _pp_transformer_map(self) -> dict[int, list[str]]:
        last = len(self.layer_keys) + self.final_layer_norm_idx
        layers = self.layer_keys[1:last] if self.layer_keys else []
        if self.pp_degree == 0:
            return {}
        return dict(enumerate(partition_data(layers, self.pp_degree)))

    def _transformer_file_map(self) -> dict[tuple[int, int], list[list[str]]]:
        found: dict[tuple[int, int], list[list[str]]] = {}
        for stage, layers in self.pp_to_transformer_map.items():
            for layer in layers:
                for rank, files in self._slices_of(layer).items():
                    found.setdefault((rank, stage), []).append(files)
        return found

    def _tp_layer_map(self, layer_index: int) -> dict[int, list[str]]:
        return self._slices_of(self.layer_keys[layer_index]) if self.layer_keys else {}

    def _slices_of(self, layer: str) -> dict[int, list[str]]:
        files = get_files_with_prefix(self.layer_files, f"{layer}-")
        return dict(enumerate(partition_data(files, self.tp_degree)))

    # - looking at it

    def validate_files(self) -> None:
        """Print the files that are missing."""
        validate_files(self.file_list)

    def show_2d_mapping(self) -> None:
        """Print the model files of each place."""
        print("reshaped 2d map ---- begin")
        for p in range(self.pp_degree):
            for t in range(self.tp_degree):
                print(f"[{p}, {t}] = {self.get_2d_parallel_files(t, p)}")
        print("reshaped 2d map ---- end")

    def show_tp_embedding_map(self) -> None:
        """Print the first layer's files by rank."""
        _dump(self.tp_to_embedding_map, "tp_to_embedding_layers")

    def show_tp_final_norm_map(self) -> None:
        """Print the final norm's files by rank."""
        _dump(self.tp_to_final_norm_map, "tp_to_final_norm_layers")

    def show_pp_transformer_map(self) -> None:
        """Print the layers of each stage."""
        _dump(self.pp_to_transformer_map, "pp_to_transformer_layers")

    def show_transformer_file_map(self) -> None:
        """Print the layer files of each place."""
        _dump(self.transformer_file_map, "rank_to_transformer_files")


def _dump(data: Mapping[Any, Any], tag: str) -> None:
    print(f"Dump mapping: {tag}")
    for key, value in data.items():
        print(f"{key} = {value}")


def _pipeline_layer_files(files: Sequence[str]) -> list[str]:
    """Those of `layer_<nn>-...`; experts' files begin with `layer_` too."""
    found = get_files_with_prefix(files, LAYER_FILE_PREFIX)
    return [path for path in found if "_expert_" not in os.path.basename(path)]


def _layer_keys(files: Sequence[str]) -> list[str]:
    names = (os.path.basename(path).split("-")[0] for path in files)
    return list(dict.fromkeys(names))


def _joined_layers(files: Sequence[str]) -> dict[str, Any]:
    """A layer's weights, joined of its slices as Megatron cuts them."""
    states = [own_memory(load_file(path)) for path in files]
    joined = {}
    for name, first in states[0].items():
        slices = [state[name] for state in states]
        whole = (
            not isinstance(first, torch.Tensor) or len(slices) == 1 or name.endswith(_REPLICATED)
        )
        joined[name] = (
            first if whole else torch.cat(slices, 1 if name.endswith(_CUT_ALONG_ROWS) else 0)
        )
    return joined
