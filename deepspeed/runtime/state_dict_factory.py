# SPDX-License-Identifier: Apache-2.0
"""Megatron checkpoints of some tensor-parallel ranks, read by a run with more or fewer of them.

[Note: Megatron's names]
Which weights are cut over the ranks, and along which dimension, follows from the ends of their names alone. What has
another name counts as equal on all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .weight_quantizer import WeightQuantization

AUTO_MODULE_KEY = "auto"
_MODULE_KEYS = ("model", "module")

_QKV = "attention.query_key_value"
# ends of names -> the dimension that is cut; see [Note: Megatron's names]
_BY_COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
_BY_ROWS = ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "word_embeddings.weight")
_BY_ROWS_WHEN_SPLIT = (*_BY_ROWS, "final_linear.weight")
_QUANTIZED = (*_BY_COLUMNS, "mlp.dense_h_to_4h.weight", f"{_QKV}.weight")
# what every checkpoint of this kind has
_EXPECTED = (*_BY_COLUMNS, _QKV, *_BY_ROWS[:2])
# descriptions that are read elsewhere
_DESCRIPTIONS = ("bloom", "ds_model")


class Loaded(NamedTuple):
    """What `SDLoaderBase.load` gives."""

    path: str
    """The file that the rank begins at."""
    state: dict[str, Any]
    """The rank's state dict, as its file has it but for the module's part."""
    scales: tuple[Any, int]
    """Scales of quantized weights (None without quantization), and how many files were joined."""


class SDLoaderFactory:
    """Makes loaders of checkpoints."""

    @staticmethod
    def get_sd_loader_json(
        json_file: str | Path | Mapping[str, Any], checkpoint_engine: Any
    ) -> Any:
        """A loader by a description: a JSON file, or its content.

        Args:
            json_file: with `type`, `checkpoints` (files in the order of ranks) and `version`.
            checkpoint_engine: reads files, by `load(path, map_location=...)`.

        Returns:
            The loader; for the types "bloom" and "ds_model" the description itself.

        Raises:
            AssertionError: a type that is not known.
        """
        told: Any = json_file
        if not isinstance(told, Mapping):
            told = json.loads(Path(told).read_text(encoding="utf-8"))
        if str(told["type"]).lower() in _DESCRIPTIONS:
            return told
        return SDLoaderFactory.get_sd_loader(
            told["checkpoints"], checkpoint_engine, told["type"], told.get("version")
        )

    @staticmethod
    def get_sd_loader(
        ckpt_list: Sequence[str],
        checkpoint_engine: Any,
        sd_type: str = "Megatron",
        version: float | None = None,
    ) -> MegatronSDLoader:
        """A loader of files; arguments as of `MegatronSDLoader`.

        Raises:
            AssertionError: a type that is not known.
        """
        if sd_type != "Megatron":
            raise AssertionError(
                explain(
                    f"{sd_type} checkpoint type is not supported", expected="the type 'Megatron'"
                )
            )
        return MegatronSDLoader(ckpt_list, version, checkpoint_engine)


class SDLoaderBase:
    """Files of tensor-parallel ranks, joined or split for a run of other ranks; derived classes know how.

    Args:
        ckpt_list: the files, in the order of the ranks that wrote them.
        version: of the order of values in `query_key_value`; None for what the files say.
        checkpoint_engine: reads files, by `load(path, map_location=...)`; None for torch's format.

    Raises:
        AssertionError: no files, or another number than the ranks that wrote them.
    """

    def __init__(
        self, ckpt_list: Sequence[str], version: float | None, checkpoint_engine: Any = None
    ) -> None:
        if checkpoint_engine is None:
            from .checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

            checkpoint_engine = TorchCheckpointEngine()
        self.module_key: str | None = None
        self.ckpt_list = list(ckpt_list)
        self.version = version
        self.checkpoint_engine = checkpoint_engine
        self.check_ckpt_list()

    def check_ckpt_list(self) -> None:
        """Raise AssertionError unless there are as many files as ranks that wrote them."""
        if not self.ckpt_list:
            raise AssertionError(explain("there are no files", got=[], expected="one or more"))
        ranks = self._read(0).get("mp_world_size", len(self.ckpt_list))
        if ranks != len(self.ckpt_list):
            raise AssertionError(
                explain(
                    "files of the checkpoint are missing, or there are too many",
                    got=f"{len(self.ckpt_list)} files",
                    expected=f"{ranks}, one of each rank that wrote it",
                )
            )

    def load(
        self,
        mp_world_size: int,
        mp_rank: int,
        module_key: str | None = AUTO_MODULE_KEY,
        is_pipe_parallel: bool = False,
        quantize: bool = False,
        quantize_bits: int = 8,
        quantize_groups: int = 64,
        mlp_extra_grouping: bool = True,
    ) -> Loaded:
        """The state of one rank.

        Args:
            mp_world_size, mp_rank: of the run that reads.
            module_key: under which name the files have the module's state; "auto" for "model" or "module", None for
                files that hold nothing else.
            is_pipe_parallel: the files hold no module (pipeline stages have files of their own), so any will do.
            quantize: round the weights of attention and MLPs; `quantize_bits`, `quantize_groups` and
                `mlp_extra_grouping` as of `WeightQuantization`.

        Raises:
            AssertionError: no such rank, ranks that do not divide one another, a file without the module, an unknown version.
        """
        self.module_key = module_key
        files = len(self.ckpt_list)
        if is_pipe_parallel and module_key is not None and mp_world_size != files:
            mp_world_size, mp_rank = files, 0
        if not 0 <= mp_rank < mp_world_size:
            raise AssertionError(
                explain("there is no such rank", got=mp_rank, expected=f"0 to {mp_world_size - 1}")
            )
        first = mp_rank * files // mp_world_size
        options = (quantize, quantize_bits, quantize_groups, mlp_extra_grouping)
        joined = 1
        if files == mp_world_size:
            state, scales = self._read(first), None
            if quantize:
                packs = WeightQuantization(mlp_extra_grouping, mp_world_size)
                module, scales = packs.sd_quantize_megatron(
                    self.get_module(state), quantize_bits, quantize_groups
                )
                state = self.set_module(state, module)
        elif files > mp_world_size:
            state, scales, joined = self.merge_state_dict(mp_world_size, mp_rank, *options)
        else:
            state, scales = self.split_state_dict(mp_world_size, mp_rank, *options)
        return Loaded(self.ckpt_list[first], state, (scales, joined))

    def get_merge_state_dicts(self, mp_world_size: int, mp_rank: int) -> list[dict[str, Any]]:
        """The contents of the files that make up one rank of fewer."""
        _check_divides(len(self.ckpt_list), mp_world_size)
        count = len(self.ckpt_list) // mp_world_size
        return [self._read(mp_rank * count + number) for number in range(count)]

    def get_split_state_dict(
        self, mp_world_size: int, mp_rank: int
    ) -> tuple[dict[str, Any], int, int]:
        """The content of the file that one rank of more is a part of, in how many parts, and which."""
        _check_divides(mp_world_size, len(self.ckpt_list))
        parts = mp_world_size // len(self.ckpt_list)
        return self._read(mp_rank // parts), parts, mp_rank % parts

    def get_module(self, sd: Mapping[str, Any]) -> Any:
        """The module's part of a file's content."""
        key = self._key_in(sd)
        return sd if key is None else sd[key]

    def set_module(self, sd: dict[str, Any], module: Any) -> dict[str, Any]:
        """A file's content with another module's part."""
        key = self._key_in(sd)
        return module if key is None else {**sd, key: module}

    def merge_state_dict(
        self,
        mp_world_size: int,
        mp_rank: int,
        quantize: bool = False,
        quantize_bits: int = 8,
        groups: int = 64,
        mlp_extra_grouping: bool = True,
    ) -> tuple[dict[str, Any], Any, int]:
        """Join files; returns the state, the scales and how many files it was."""
        raise NotImplementedError

    def split_state_dict(
        self,
        mp_world_size: int,
        mp_rank: int,
        quantize: bool = False,
        quantize_bits: int = 8,
        groups: int = 64,
        mlp_extra_grouping: bool = True,
    ) -> tuple[dict[str, Any], Any]:
        """Take a part of a file; returns the state and the scales."""
        raise NotImplementedError

    def _read(self, number: int) -> dict[str, Any]:
        return self.checkpoint_engine.load(self.ckpt_list[number], map_location="cpu")

    def _key_in(self, sd: Mapping[str, Any]) -> str | None:
        if self.module_key != AUTO_MODULE_KEY:
            return self.module_key
        found = [key for key in _MODULE_KEYS if key in sd]
        if len(found) != 1:
            which = "both" if found else "neither"
            joint = "and" if found else "or"
            raise AssertionError(
                f"checkpoint contains {which} 'model' {joint} 'module' keys, not sure how to proceed: "
                "name the one that holds the module by module_key"
            )
        return found[0]


class MegatronSDLoader(SDLoaderBase):
    """Checkpoints of Megatron's transformers; see `SDLoaderBase` and [Note: Megatron's names].

    Versions of the order of rows in `query_key_value`: 0 has all queries, then all keys, then all values; 1.0 and 2.0
    have them head by head.
    """

    def merge_state_dict(
        self,
        mp_world_size: int,
        mp_rank: int,
        quantize: bool = False,
        quantize_bits: int = 8,
        groups: int = 64,
        mlp_extra_grouping: bool = True,
    ) -> tuple[dict[str, Any], Any, int]:
        """Join files; returns the state, the scales and how many files it was.

        Raises:
            AssertionError: not a Megatron checkpoint, or of an unknown version.
        """
        self.sanity_check(self.ckpt_list[0])
        states = self.get_merge_state_dicts(mp_world_size, mp_rank)
        modules = [self.get_module(state) for state in states]
        _check_alike(self.ckpt_list, modules)
        version = self.get_checkpoint_version(states[0])
        packs = WeightQuantization(mlp_extra_grouping, mp_world_size)

        def rounded(key: str, parts: list[Any], dim: int) -> list[Any]:
            if not (quantize and key.endswith(_QUANTIZED)):
                return parts
            return packs.Quantize(parts, quantize_bits, groups, key, merge_dim=dim)

        merged: dict[str, Any] = {}
        unlike = []
        for key in modules[0]:
            parts = [module[key] for module in modules]
            if key.endswith(_BY_COLUMNS):
                merged[key] = torch.cat(rounded(key, parts, 1), dim=1)
            elif _QKV in key:
                whole = self.merge_query_key_value(parts, version)
                if quantize and key.endswith(
                    _QUANTIZED
                ):  # whole, as joining may change its rows' order
                    whole = packs.Quantize([whole], quantize_bits, groups * len(parts), key)[0]
                merged[key] = whole
            elif key.endswith(_BY_ROWS):
                merged[key] = torch.cat(rounded(key, parts, 0), dim=0)
            else:
                merged[key] = parts[0]
                if not all(_equal(parts[0], part) for part in parts[1:]):
                    unlike.append(key)
        if unlike:
            logger.warning(
                f"{', '.join(unlike)}: not known as cut over ranks, yet their values differ; those of the first rank are taken"
            )
        scales = packs.merge_scales() if quantize else None
        return self.set_module(states[0], merged), scales, len(states)

    def split_state_dict(
        self,
        mp_world_size: int,
        mp_rank: int,
        quantize: bool = False,
        quantize_bits: int = 8,
        groups: int = 64,
        mlp_extra_grouping: bool = True,
    ) -> tuple[dict[str, Any], Any]:
        """Take a part of a file; returns the state and the scales.

        Raises:
            AssertionError: a weight that does not divide, or an unknown version.
        """
        state, parts, which = self.get_split_state_dict(mp_world_size, mp_rank)
        module = self.get_module(state)
        version = self.get_checkpoint_version(state)
        packs = WeightQuantization(mlp_extra_grouping, mp_world_size)
        split: dict[str, Any] = {}
        for key, value in module.items():
            if quantize and key.endswith(_QUANTIZED):
                value = packs.Quantize([value], quantize_bits, groups, key)[0]
            if key.endswith(_BY_COLUMNS):
                value = _part(key, value, parts, which, 1)
            elif _QKV in key:
                value = self.split_query_key_value(value, parts, which, version)
            elif key.endswith(_BY_ROWS_WHEN_SPLIT):
                value = _part(key, value, parts, which, 0)
            split[key] = value
        scales = packs.merge_scales_split(parts)[which] if quantize else None
        return self.set_module(state, split), scales

    def merge_query_key_value(self, param_list: list[Tensor], ckpt_ver: float) -> Tensor:
        """Join the parts of one `query_key_value`."""
        if self._head_by_head(ckpt_ver):
            return torch.cat(param_list, dim=0)
        thirds = [_thirds(param) for param in param_list]
        return torch.cat([torch.cat(same, dim=0) for same in zip(*thirds, strict=True)], dim=0)

    def split_query_key_value(
        self, param: Tensor, num_to_split: int, offset: int, ckpt_ver: float
    ) -> Tensor:
        """Take a part of one `query_key_value`."""
        if self._head_by_head(ckpt_ver):
            return _part(_QKV, param, num_to_split, offset, 0)
        return torch.cat([_part(_QKV, p, num_to_split, offset, 0) for p in _thirds(param)], dim=0)

    def sanity_check(self, ckpt_file_name: str) -> None:
        """Raise AssertionError unless a file holds the weights that every Megatron transformer has."""
        module = self.get_module(self.checkpoint_engine.load(ckpt_file_name, map_location="cpu"))
        for wanted in _EXPECTED:
            if not any(wanted in str(key) for key in module):
                raise AssertionError(
                    f"key: {wanted} is not found in the checkpoint {ckpt_file_name}"
                )

    def get_checkpoint_version(self, state_dict: Mapping[str, Any]) -> float:
        """The version that was given to the loader, else the one that a file says, else 0."""
        return self.version if self.version is not None else state_dict.get("checkpoint_version", 0)

    @staticmethod
    def _head_by_head(version: float) -> bool:
        if version not in (0, 1.0, 2.0):
            raise AssertionError(f"checkpoint version: {version} is not supported")
        return version != 0


def merged_module(
    files: Sequence[str], version: float | None, read: Callable[[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """The module's state of a whole Megatron checkpoint.

    Args:
        files: one of each rank, in their order.
        version: see `MegatronSDLoader`.
        read: gives a file's content.
    """

    class Reader:
        def load(self, path: str, map_location: Any = None) -> Mapping[str, Any]:
            return read(path)

    loader = MegatronSDLoader(files, version, Reader())
    content = read(files[0])
    key = AUTO_MODULE_KEY if any(name in content for name in _MODULE_KEYS) else None
    state = loader.load(1, 0, module_key=key).state
    return loader.get_module(state)


def _thirds(param: Tensor) -> tuple[Tensor, ...]:
    if param.shape[0] % 3:
        raise AssertionError(
            explain(
                "queries, keys and values cannot be told apart",
                got=f"{tuple(param.shape)}",
                expected="three times as many rows as each",
            )
        )
    return param.split(param.shape[0] // 3)


def _part(key: str, value: Tensor, parts: int, which: int, dim: int) -> Tensor:
    if value.shape[dim] % parts:
        raise AssertionError(
            explain(
                f"{key} cannot be divided over the ranks",
                got=f"{tuple(value.shape)} in {parts} along dimension {dim}",
            )
        )
    return value.chunk(parts, dim)[which].clone()


def _check_alike(files: Sequence[str], modules: Sequence[Mapping[str, Any]]) -> None:
    for module in modules[1:]:
        unlike = sorted(set(modules[0]) ^ set(module), key=str)
        if unlike:
            raise AssertionError(
                explain(
                    "files of ranks hold different weights",
                    got=f"{', '.join(map(str, unlike[:4]))} in some only of {', '.join(map(str, files))}",
                    expected="the same names in all",
                )
            )


def _equal(first: Any, other: Any) -> bool:
    if torch.is_tensor(first) and torch.is_tensor(other):
        return torch.equal(first, other)
    return type(first) is type(other)


def _check_divides(more: int, fewer: int) -> None:
    if more % fewer:
        raise AssertionError(
            explain(
                "ranks of the checkpoint and of the run do not divide one another",
                got=f"{more} and {fewer}",
            )
        )
