#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Turns the shards of a ZeRO checkpoint (stages 1 to 3) into one set of fp32 weights. Needs nothing but torch.

This very file is copied beside every checkpoint, so that weights can be taken out of it without this package:

    python zero_to_fp32.py . output/                       # output/pytorch_model.bin
    python zero_to_fp32.py . output/ --safe_serialization  # output/model.safetensors
    python zero_to_fp32.py . output/ --max_shard_size 2GB --tag global_step100

Files are mapped rather than read, and weights are put together one by one: memory for one output file (with
--safe_serialization for one tensor) is enough. Files are checked against the checkpoint's manifest, and their pickles
are read by an allow-list, so that a damaged or hostile file gives an error and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import re
import struct
import sys
import time
import types
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

# The names of the format. They are spelled again in deepspeed/checkpoint/format.py; a test compares the two.
LATEST = "latest"
MANIFEST = "manifest.json"
PARTIAL_MARK = ".deepspeed_partial"
REPLACED_SUFFIX = ".old"
REPLACED_MARK = ".deepspeed_replaced"
OPTIMIZER_STATE_DICT = "optimizer_state_dict"
SINGLE_PARTITION_OF_FP32_GROUPS = "single_partition_of_fp32_groups"
FP32_FLAT_GROUPS = "fp32_flat_groups"
ZERO_STAGE = "zero_stage"
PARTITION_COUNT = "partition_count"
GROUP_PADDINGS = "group_paddings"
PARAM_PADDINGS = "param_alignment_paddings"
PARAM_SHAPES = "param_shapes"
BUFFER_NAMES = "buffer_names"
FROZEN_PARAM_SHAPES = "frozen_param_shapes"
FROZEN_PARAM_FRAGMENTS = "frozen_param_fragments"
SHARED_PARAMS = "shared_params"
MODULE = "module"
DS_VERSION = "ds_version"
DS_CONFIG = "ds_config"
DATA_BEFORE_EXPERT = "use_data_before_expert_parallelism"
AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY = "ds_autoep_layers", "autoep_layers"

_EXPERT = re.compile(r"(.+\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..+)")

# A group's flat weights are padded to a multiple of this many elements a rank (stages 1 and 2).
ALIGNMENT = 2

# - reading files


class _Inert:
    """Stands for an object that older checkpoints pickled."""


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "deepspeed.runtime.zero.config" and name == "ZeroStageEnum":
            return int
        if (module, name) in _INERT:
            return _Inert
        if module == "torch._utils" and name in (
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_parameter",
        ):
            return getattr(torch._utils, name)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild
        if module == "torch" and (
            name in ("Size", "device") or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(torch, name)
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        raise pickle.UnpicklingError(f"{module}.{name}")


_INERT = {
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    # only ever named as the type of a tensor that `_rebuild` makes
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


def _rebuild(function: Any, kind: Any, arguments: Any, state: Any) -> torch.Tensor:
    if function not in (
        torch._utils._rebuild_tensor,
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_parameter,
    ):
        raise pickle.UnpicklingError(f"a tensor made by {function!r}")
    return function(*arguments)


def _load(path: Path) -> Any:
    """One file, its tensors mapped into memory where the format allows it."""
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        pass  # written by a version that pickled objects of its own
    module = types.SimpleNamespace(
        __name__="zero_to_fp32",
        Unpickler=_Unpickler,
        load=lambda file, **options: _Unpickler(file, **options).load(),
    )
    try:
        return torch.load(
            str(path), map_location="cpu", weights_only=False, pickle_module=module, mmap=is_zip
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain containers ({error})"
        ) from error


def _check_manifest(folder: Path, files: list[Path]) -> None:
    """Compare files with the sizes and hashes that were noted when they were saved (older folders have none)."""
    if (folder / PARTIAL_MARK).exists():
        raise ValueError(f"{folder} is a save that did not finish; use another tag")
    path = folder / MANIFEST
    if not path.is_file():
        return
    noted = json.loads(path.read_text(encoding="utf-8"))["files"]
    for file in files:
        entry = noted.get(file.name)
        if entry is None:
            continue
        digest, total = (None if "crc32" in entry else hashlib.sha256()), 0
        with open(file, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 22):
                if digest is None:
                    total = zlib.crc32(chunk, total)
                else:
                    digest.update(chunk)
        found = f"{total:08x}" if digest is None else digest.hexdigest()
        if file.stat().st_size != entry["size"] or found not in (
            entry.get("crc32"),
            entry.get("sha256"),
        ):
            raise ValueError(
                f"{file} is damaged: its size or content differs from what was saved; use another tag"
            )


def natural_keys(text: str) -> list[int | str]:
    """Sort key that puts `rank_10` after `rank_9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def get_checkpoint_files(checkpoint_dir: str | os.PathLike[str], glob_pattern: str) -> list[str]:
    """Paths in a folder that match, in natural order.

    Raises:
        FileNotFoundError: none does.
    """
    found = sorted((str(p) for p in Path(checkpoint_dir).glob(glob_pattern)), key=natural_keys)
    if not found:
        raise FileNotFoundError(f"no {glob_pattern} in {checkpoint_dir}")
    return found


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """Paths of the optimizer shards of a tag's folder, by rank."""
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """Paths of the model states of a tag's folder, by rank."""
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> str:
    """Path of the first rank's model states.

    Raises:
        FileNotFoundError: there is none.
    """
    name = (
        "mp_rank_00_model_states.pt"
        if int(zero_stage) <= 2
        else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    )
    path = Path(checkpoint_dir) / name
    if not path.exists():
        raise FileNotFoundError(f"can't find the model states '{path}'")
    return str(path)


# - the checkpoint, weight by weight


class Weight:
    """One parameter that is put together when it is asked for.

    Attributes:
        shape, dtype: of the tensor that `contiguous` gives.
    """

    dtype = torch.float32

    def __init__(self, shape: Any, runs: list[tuple[torch.Tensor, int, int]]) -> None:
        self.shape = torch.Size(shape)
        self._runs = runs

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def contiguous(self) -> torch.Tensor:
        """The parameter as a new fp32 tensor."""
        whole = torch.empty(self.numel(), dtype=torch.float32, device="cpu")
        done = 0
        for source, start, length in self._runs:
            run = source.detach().reshape(-1).narrow(0, start, length)
            whole.narrow(0, done, length).copy_(run)
            _page_out(run)
            done += length
        if done != whole.numel():
            raise ValueError(
                f"{done} elements saved where a shape of {tuple(self.shape)} needs {whole.numel()}"
            )
        return whole.view(self.shape)


_PAGE_OUT = 21
_PAGED_AT_ONCE = 1 << 20


def _page_out(run: torch.Tensor) -> None:
    """Let the system take back the pages that a run was mapped by (Linux; it keeps what is no file's)."""
    nbytes, page = run.numel() * run.element_size(), 4096
    if not sys.platform.startswith("linux") or nbytes < _PAGED_AT_ONCE:
        return
    start = -(-run.data_ptr() // page) * page
    end = (run.data_ptr() + nbytes) // page * page
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)


def _tag_folder(checkpoint_dir: str | os.PathLike[str], tag: str | None) -> Path:
    root = Path(checkpoint_dir)
    if tag is None:
        latest = root / LATEST
        if not latest.is_file():
            raise ValueError(f"Unable to find '{LATEST}' file at {latest}; pass tag")
        tag = latest.read_text(encoding="utf-8").strip()
    folder = root / tag
    if (
        not tag
        or ".." in Path(tag).parts
        or folder.is_absolute() != root.is_absolute()
        or root not in folder.parents
    ):
        raise ValueError(f"the tag {tag!r} does not name a folder in {root}")
    asides = [folder.with_name(folder.name + REPLACED_SUFFIX * count) for count in (1, 2)]
    found = [path for path in asides if path.is_dir()]
    if not folder.is_dir() and found:
        folder = min(found, key=lambda path: not (path / REPLACED_MARK).exists())
    if not folder.is_dir():
        raise FileNotFoundError(f"Directory '{folder}' doesn't exist")
    return folder


def _weights(folder: Path, exclude_frozen: bool) -> OrderedDict[str, Weight]:
    """Every weight of a checkpoint, none of them put together yet."""
    optim_files = [Path(file) for file in get_optim_files(folder)]
    # experts' files hold 16-bit copies of what the shards hold in full
    model_files = [Path(f) for f in get_model_state_files(folder) if "_expert_" not in f]
    _check_manifest(folder, optim_files + model_files)
    shards = [_load(file)[OPTIMIZER_STATE_DICT] for file in optim_files]
    if ZERO_STAGE not in shards[0]:
        raise ValueError(f"{optim_files[0]} is not a zero checkpoint")
    stage = int(shards[0][ZERO_STAGE])
    count = shards[0][PARTITION_COUNT]
    world = max(count) if isinstance(count, list) else count
    if world != len(shards):
        raise ValueError(
            f"Expected {world} of '*_optim_states.pt' under '{folder}' but found {len(shards)} files."
        )
    models = [_load(file) for file in (model_files if stage == 3 else model_files[:1])]
    _refuse_spread_experts(models[0])
    weights: OrderedDict[str, Weight] = OrderedDict()
    for name in models[0][BUFFER_NAMES]:
        if name in models[0][MODULE]:
            weights[name] = _of_tensor(models[0][MODULE][name])
    if not exclude_frozen:
        weights.update(_frozen(models, stage, world))
    if stage == 3:
        weights.update(_split_each(models[0][PARAM_SHAPES], shards))
    else:
        config = models[0].get(DS_CONFIG)
        data_first = bool(isinstance(config, Mapping) and config.get(DATA_BEFORE_EXPERT))
        weights.update(_split_flat(models[0][PARAM_SHAPES], shards, data_first))
    shared = models[0].get(SHARED_PARAMS) or {}
    if not exclude_frozen and stage < 3:
        for name, value in models[0][MODULE].items():
            is_extra = not isinstance(value, torch.Tensor)  # a module's `get_extra_state`
            if name not in weights and name not in shared and not is_extra:
                weights[name] = _of_tensor(value)
    for alias, name in shared.items() if isinstance(shared, Mapping) else shared:
        if name in weights:
            weights[alias] = weights[name]
    return weights


def _refuse_spread_experts(model: Mapping[str, Any]) -> None:
    """Refuse stacked experts that several ranks share: a rank's shards hold a part of each stack."""
    entries = model.get(AUTOEP_LAYERS_KEY) or model.get(AUTOEP_LAYERS_KEY_LEGACY) or ()
    if any(entry.get("ep_size", 1) > 1 for entry in entries):
        raise NotImplementedError(
            "the checkpoint has experts that AutoEP spread over ranks, which this script does not put together; convert "
            "it with ds_to_universal.py, or save with engine.save_16bit_model"
        )


def _raise_if_autoep_zero3_partitioned_checkpoint(files: list[str]) -> None:
    for file in files:
        _refuse_spread_experts(_load(Path(file)))


def parse_model_states(files: list[str]) -> list[Any]:
    """The content of model files; NotImplementedError for experts that several ranks share."""
    models = [_load(Path(file)) for file in files]
    for model in models:
        _refuse_spread_experts(model)
    return models


def _of_tensor(value: torch.Tensor) -> Weight:
    return Weight(value.shape, [(value, 0, value.numel())])


def _frozen(models: list[Any], stage: int, world: int) -> Iterator[tuple[str, Weight]]:
    for name, shape in (models[0].get(FROZEN_PARAM_SHAPES) or {}).items():
        left, runs = torch.Size(shape).numel(), []
        for model in models[: world if stage == 3 else 1]:
            part = model[FROZEN_PARAM_FRAGMENTS][name]
            length = min(left, part.numel())
            runs.append((part, 0, length))
            left -= length
        yield name, Weight(shape, runs)


def _split_flat(
    shapes: list[Mapping[str, Any]], shards: list[Any], data_first: bool
) -> Iterator[tuple[str, Weight]]:
    """Stages 1 and 2: a group's weights end to end, cut into equal slices, one a rank."""
    for group, names in enumerate(shapes):
        flats = [shard[SINGLE_PARTITION_OF_FP32_GROUPS][group] for shard in shards]
        count = shards[0][PARTITION_COUNT]
        world = count[group] if isinstance(count, list) else count
        gaps = (shards[0].get(PARAM_PADDINGS) or {group: None})[group] or [0] * len(names)
        total = sum(torch.Size(shape).numel() for shape in names.values()) + sum(gaps)
        if world < len(shards):
            yield from _split_experts(names, flats, world, data_first)
            continue
        piece = -(-total // (ALIGNMENT * world)) * ALIGNMENT
        for rank, flat in enumerate(flats[:world]):
            needed = max(0, min(piece, total - rank * piece))
            if not needed <= flat.numel() <= piece:
                raise ValueError(
                    f"group {group}, rank {rank}: {flat.numel()} elements where {needed} are needed"
                )
        start = 0
        for (name, shape), gap in zip(names.items(), gaps, strict=True):
            numel = torch.Size(shape).numel()
            yield name, Weight(shape, list(_cut(flats, piece, start, numel)))
            start += numel + gap


def _split_experts(
    names: Mapping[str, Any], flats: list[torch.Tensor], world: int, data_first: bool
) -> Iterator[tuple[str, Weight]]:
    """A group of which the ranks hold several sets: experts, numbered from 0 in each set.

    Ranks with equal experts are `sets` apart; with `data_first` side by side.
    """
    found = [_EXPERT.fullmatch(name) for name in names]
    here: dict[str, int] = {}  # experts of each layer in one set
    for match in filter(None, found):
        here[match[1]] = max(here.get(match[1], 0), int(match[2]) + 1)
    total = sum(torch.Size(shape).numel() for shape in names.values())
    piece = -(-total // (ALIGNMENT * world)) * ALIGNMENT
    sets = len(flats) // world
    for own in range(sets):
        held = flats[own * world : (own + 1) * world] if data_first else flats[own::sets]
        start = 0
        for (name, shape), match in zip(names.items(), found, strict=True):
            if match:
                name = f"{match[1]}{own * here[match[1]] + int(match[2])}{match[3]}"
            numel = torch.Size(shape).numel()
            yield name, Weight(shape, list(_cut(held, piece, start, numel)))
            start += numel


def _cut(
    flats: list[torch.Tensor], piece: int, start: int, numel: int
) -> Iterator[tuple[torch.Tensor, int, int]]:
    end = start + numel
    while start < end:
        rank, offset = divmod(start, piece)
        length = min(end - start, piece - offset)
        yield flats[rank], offset, length
        start += length


def _split_each(shapes: list[Mapping[str, Any]], shards: list[Any]) -> Iterator[tuple[str, Weight]]:
    """Stage 3: every weight cut by itself; a rank's sub-groups hold its pieces in the order of the weights."""
    world = len(shards)
    flats = [shard[FP32_FLAT_GROUPS] for shard in shards]
    sizes = [flat.numel() for flat in flats[0]]
    group = start = 0
    for names in shapes:
        for name, shape in names.items():
            numel = torch.Size(shape).numel()
            piece = -(-numel // world)
            while piece and group < len(sizes) and start == sizes[group]:
                group, start = group + 1, 0
            if piece and (group == len(sizes) or start + piece > sizes[group]):
                raise ValueError(f"the shards end before {name}, or cut it where they should not")
            runs = []
            for rank in range(world):
                length = max(0, min(piece, numel - rank * piece))
                if length:
                    runs.append((flats[rank][group], start, length))
            yield name, Weight(shape, runs)
            start += piece
    held = sum(sizes)
    wanted = sum(-(-torch.Size(s).numel() // world) for names in shapes for s in names.values())
    if held != wanted:
        raise ValueError(
            f"consumed {wanted * world} numels out of {held * world} - something is wrong"
        )


# - the public functions


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> OrderedDict[str, Any]:
    """The fp32 weights of a ZeRO checkpoint.

    Args:
        checkpoint_dir: the folder that holds the tags.
        tag: which of them; None is what `latest` names.
        exclude_frozen_parameters: leave out parameters that were not trained.
        lazy_mode: give objects with `.shape`, `.dtype` and `.contiguous()`, which puts one weight together.

    Returns:
        Tensors in host memory by name. Buffers are fp32 too. Weights that were shared are the same tensor.

    Raises:
        ValueError: files are damaged, refused or contradict each other.
        FileNotFoundError: there is no such checkpoint.

    Example:
        >>> model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint("checkpoints"))
    """
    weights = _weights(_tag_folder(checkpoint_dir, tag), exclude_frozen_parameters)
    if lazy_mode:
        return weights
    return _put_together(weights)


def load_state_dict_from_zero_checkpoint(
    model: torch.nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> torch.nn.Module:
    """Move `model` to the CPU and load a ZeRO checkpoint's fp32 weights into it; returns the model.

    Weights that stage 3 had sharded are whole afterwards. An engine that trained the model cannot go on using it.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in state and hasattr(param, "ds_shape") and param.shape != param.ds_shape:
            param.data = torch.empty(param.ds_shape, dtype=param.dtype, device="cpu")
            param.ds_status = type(param.ds_status).AVAILABLE
    model.load_state_dict(state, strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the fp32 weights of a ZeRO checkpoint as files that other libraries load.

    Args:
        checkpoint_dir: the folder that holds the tags.
        output_dir: receives `pytorch_model.bin` or `model.safetensors`, or numbered files and an index.
        max_shard_size: size above which the output is split, in bytes or as "5GB"; None never splits.
        safe_serialization: write safetensors.
        tag: which checkpoint; None is what `latest` names.
        exclude_frozen_parameters: leave out parameters that were not trained.
    """
    weights = _weights(_tag_folder(checkpoint_dir, tag), exclude_frozen_parameters)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    plan = _plan_shards(weights, None if max_shard_size is None else _bytes(max_shard_size))
    write = _write_safetensors if safe_serialization else _write_torch
    weight_map = {}
    for number, names in enumerate(plan, start=1):
        several = f"-{number:05d}-of-{len(plan):05d}" if len(plan) > 1 else ""
        file = f"{stem}{several}.{suffix}"
        weight_map.update(dict.fromkeys(names, file))
        print(f"writing {output / file} ({len(names)} tensors)")
        some = OrderedDict((name, weights[name]) for name in names)
        with _published(output / file) as temporary:
            write(temporary, some)
    if len(plan) > 1:
        total = sum(4 * weight.numel() for weight in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        with _published(output / f"{stem}.{suffix}.index.json") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


def _bytes(size: str | int) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", size.upper())
    if match is None:
        raise ValueError(f"max_shard_size must be a number of bytes or like '5GB', got {size!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2] or " "))


def _plan_shards(weights: Mapping[str, Weight], limit: int | None) -> list[list[str]]:
    """Names of each output file, in order, every file as full as fits."""
    plan: list[list[str]] = [[]]
    used = 0
    for name, weight in weights.items():
        size = 4 * weight.numel()
        if limit is not None and plan[-1] and used + size > limit:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += size
    return plan


@contextlib.contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Give a name of this process's own to write (each rank may convert), and rename the file once it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for pause in (0.05, 0.2, 1.0, None):
            try:
                os.replace(temporary, path)
                break
            except PermissionError:  # on Windows, while somebody has the file open
                if pause is None:
                    raise
                time.sleep(pause)
    finally:
        temporary.unlink(missing_ok=True)


def _write_torch(path: Path, weights: Mapping[str, Weight]) -> None:
    torch.save(_put_together(weights), path)


def _put_together(weights: Mapping[str, Weight]) -> OrderedDict[str, Any]:
    made: dict[int, torch.Tensor] = {}
    for weight in weights.values():
        if id(weight) not in made:
            made[id(weight)] = weight.contiguous()
    return OrderedDict((name, made[id(weight)]) for name, weight in weights.items())


def _write_safetensors(path: Path, weights: Mapping[str, Weight]) -> None:
    """The whole format: length of a JSON header, the header, the tensors' bytes end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for weight in weights.values():
            if weight.numel():
                file.write(memoryview(weight.contiguous().reshape(-1).numpy()).cast("B"))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Turn the shards of a ZeRO checkpoint into fp32 weights."
    )
    parser.add_argument(
        "checkpoint_dir", help="folder with the file 'latest', e.g. path/checkpoint-12"
    )
    parser.add_argument("output_dir", help="folder that receives the weights")
    parser.add_argument(
        "--max_shard_size", default="5GB", help="split the output above this size (default 5GB)"
    )
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors")
    parser.add_argument(
        "-t", "--tag", default=None, help="tag to use instead of the one that 'latest' names"
    )
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave frozen parameters out"
    )
    parser.add_argument("-d", "--debug", action="store_true", help="show where an error came from")
    options = parser.parse_args(arguments)
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            options.checkpoint_dir,
            options.output_dir,
            max_shard_size=options.max_shard_size,
            safe_serialization=options.safe_serialization,
            tag=options.tag,
            exclude_frozen_parameters=options.exclude_frozen_parameters,
        )
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        sys.exit(f"zero_to_fp32: {error}")


if __name__ == "__main__":
    main()
