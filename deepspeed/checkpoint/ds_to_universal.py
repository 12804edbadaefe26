# SPDX-License-Identifier: Apache-2.0
"""Turns a tag folder into a universal checkpoint: whole states, one folder a parameter.

    python -m deepspeed.checkpoint.ds_to_universal --input_folder ckpt/global_step10 --output_folder ckpt/universal10

Reads what any stage (0 to 3) of this package or of upstream saved, and what tensor-parallel ranks saved if the model
wrote its merge rules down (`universal_checkpoint_info`). Parameters are streamed: memory for one of them a worker is
enough. The folder appears under its name when it is complete, and then `latest_universal` names it.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..git_version_info import version
from ..utils.errors import DeepSpeedCheckpointError, explain
from . import format as names
from .atomic import Crew, Entry, publish
from .autoep_metadata import aggregate_autoep_metadata, refuse_folded
from .autoep_metadata import aggregate_autoep_metadata as _aggregate_autoep_zero12_metadata  # noqa: F401
from .autoep_universal import (  # noqa: F401  (names that callers know)
    _autoep_expert_param_names_by_rank,
    _get_zero3_model_state_files,
    _uses_zero3_partitioned_autoep_metadata,
)
from .constants import (
    SUB_PARAM_SHARD_WIDTHS,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from .format import DATA_BEFORE_EXPERT, Model, Optim, Universal, Zero, universal_state_file
from .fragments import _group_per_tp_shapes as _group_per_tp_shapes
from .fragments import _merge_zero_shards as _merge_zero_shards
from .fragments import _validate_autotp_conversion_support as _validate_autotp_conversion_support
from .fragments import merge_tp_slices as merge_tp_slices
from .merge_slices import MergeRules
from .reader import Folder
from .reshard import FP32, SavedState, from_inline, from_shards
from .stacked_experts import stack_of, stacked_names, universal_stack
from .weights import of_frozen
from .writer import plain, save_file

# One rank's copy of the states that all ranks share; `ds_config` is as long as the model file's.
_NOT_COMMON = frozenset(
    {
        Zero.LOSS_SCALER,
        Zero.BASE_STATE,
        Zero.SLICE_MAPPINGS,
        Zero.FP32_GROUPS,
        Zero.FP32_FLAT_GROUPS,
        Zero.INNER,
        Zero.WRAPPER_FLAT,
        Zero.WRAPPER_LISTS,
        Zero.WRAPPER_NAMES,
        "state",
    }
)


@dataclass
class _Part:
    """What one model-parallel rank saved.

    Attributes:
        model: its model states.
        saved: its optimizer.
        common: entries of its optimizer file.
        shapes: shape of each trained parameter there.
        stacks: names of weights in which experts are stacked.
    """

    model: Mapping[str, Any]
    saved: SavedState
    common: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]
    stacks: Mapping[str, int] = field(default_factory=dict)

    def states(self, name: str) -> list[str]:
        """Names of the element-wise states of a parameter."""
        slot = self.saved.first_slot(name)
        found = [] if slot is None else [key for key in slot.tensors if key != FP32]
        return [FP32, *found]

    def state(self, name: str, key: str) -> torch.Tensor:
        """One whole state of a parameter on this model-parallel rank."""
        if key == FP32 and not self.saved.has_masters:
            return self.model[Model.MODULE][name].detach().float()
        values = self.saved.full(name, key)
        whole = torch.empty(0, device="cpu") if values is None else values
        return whole.view(self.shapes[name])


# - reading the source


def _open_part(folder: Folder, mp_rank: int) -> _Part:
    model_names = [names.model_file(mp_rank), names.zero3_model_file(0, mp_rank)]
    model_name = next(filter(folder.has, model_names), None)
    if model_name is None:
        raise FileNotFoundError(
            explain(f"there are no model states in {folder.path}", expected=model_names[0])
        )
    model = folder.load(model_name)
    refuse_folded([model])
    if model.get(Model.PARAM_SHAPES):
        near = _shard(folder, 0, mp_rank)
        data_first = bool((model.get(Model.DS_CONFIG) or {}).get(DATA_BEFORE_EXPERT))
        stacks = stacked_names(aggregate_autoep_metadata([model]))
        saved = from_shards(
            lambda rank: _shard(folder, rank, mp_rank),
            model[Model.PARAM_SHAPES],
            data_first=data_first,
            stacks=stacks,
        )
        for rank in range(saved.world):
            saved.slots(rank)  # opened here, because workers share them
        return _Part(model, saved, near, saved.shapes, stacks)
    inline = model.get(Model.OPTIMIZER)
    if not inline or Zero.WRAPPER_NAMES not in inline:
        raise DeepSpeedCheckpointError(
            explain(
                f"{folder.path} cannot be converted",
                got="a checkpoint without optimizer shards",
                expected="one of a ZeRO optimizer, or one that this package saved",
            )
        )
    if model[Model.MODULE] is None:
        raise DeepSpeedCheckpointError(
            explain(
                f"{folder.path} cannot be converted",
                got="a pipeline's checkpoint without ZeRO, which does not tell the shapes of its weights",
                expected="one of ZeRO stage 1",
                fix="Set zero_optimization.stage to 1 and save again.",
            )
        )
    shapes = {
        n: model[Model.MODULE][n].shape for group in inline[Zero.WRAPPER_NAMES] for n in group
    }
    saved = from_inline(inline, inline[Zero.WRAPPER_NAMES], shapes)
    return _Part(model, saved, inline, shapes)


def _shard(folder: Folder, rank: int, mp_rank: int) -> Mapping[str, Any]:
    name = next(filter(folder.has, names.optim_file_candidates(rank, mp_rank)), None)
    if name is None:
        raise FileNotFoundError(
            explain(
                f"the optimizer shard of rank {rank} is missing in {folder.path}",
                expected=names.optim_file(rank, mp_rank),
            )
        )
    state = folder.load(name)[Optim.STATE]
    if Zero.PARTITION_COUNT in state or Zero.FP32_FLAT_GROUPS not in state:
        return state
    # hand-made shards: how many there are is what lies there, and their states may be listed
    ranks = len(folder.glob(f"*zero_pp_rank_*_mp_rank_{mp_rank:02d}_optim_states.pt"))
    inner = dict(state.get(Zero.INNER) or {})
    if isinstance(inner.get("state"), list):
        inner["state"] = dict(enumerate(inner["state"]))
    return {**state, Zero.PARTITION_COUNT: ranks, Zero.INNER: inner}


def _open_grid(folder: Folder) -> list[list[_Part]]:
    """The parts by pipeline stage and tensor-parallel rank."""
    first = _open_part(folder, 0)
    degrees = first.model.get(Model.PARALLEL_DIMENSIONS) or {}
    world = int(first.model.get(Model.MP_WORLD_SIZE, len(folder.model_files())))
    stages = int(degrees.get("pp_degree", 1))
    tensor = int(degrees.get("tp_degree", max(1, world // stages)))
    return [
        [first if (p, t) == (0, 0) else _open_part(folder, p * tensor + t) for t in range(tensor)]
        for p in range(stages)
    ]


# - writing


def _param_files(
    grid: Sequence[Sequence[_Part]], rules: MergeRules, name: str, stage: int
) -> Iterator[tuple[str, Any]]:
    """The files of one parameter, with their content."""
    parts = grid[stage]
    for key in parts[0].states(name):
        if name in parts[0].stacks:
            whole: Any = universal_stack(parts[0].state(name, key))
        elif parts[0].stacks and parts[0].saved.stage == 3:
            whole = parts[0].state(name, key).reshape(-1)  # what readers of spread experts expect
        else:
            whole = rules.merge(name, [part.state(name, key) for part in parts])
        yield universal_state_file(name, key), whole
    slot = parts[0].saved.first_slot(name)
    if slot is not None and "step" in slot.numbers:
        yield universal_state_file(name, "step"), slot.numbers["step"]


def _common_state(part: _Part) -> dict[str, Any]:
    """What all parameters have in common, in a form that upstream's loaders of every stage take."""
    inner = part.common.get(Zero.BASE_STATE, part.common.get(Zero.INNER, part.common))
    groups = inner.get("param_groups", []) if isinstance(inner, Mapping) else []
    state = {key: value for key, value in part.common.items() if key not in _NOT_COMMON}
    steps = [slot.numbers["step"] for slot in part.saved.slots(0) if "step" in slot.numbers]
    flat = {index: {"step": step} for index, step in enumerate(steps[: max(1, len(groups))])}
    groups = [dict(group) for group in groups]
    if not part.model.get(Model.PARAM_SHAPES):
        groups = [{**group, "params": [index]} for index, group in enumerate(groups)]
    return {
        **state,
        Zero.LOSS_SCALER_STATE: part.saved.scaler,
        Zero.STAGE: part.saved.stage,
        Zero.INNER: {"state": flat, "param_groups": groups},
        "param_groups": groups,
        "ds_version": part.model.get(Model.DS_VERSION, version),
    }


def _model_files(folder: Folder, grid: Sequence[Sequence[_Part]]) -> Iterator[tuple[str, Any]]:
    """Model states for stages 0 to 2 and, without the weights that are under `zero`, for stage 3."""
    slices = len(grid[0])
    for mp_rank, part in enumerate(part for stage in grid for part in stage):
        model = OrderedDict(part.model)
        model[Model.OPTIMIZER] = None
        model[Model.PARAM_SHAPES] = _shapes_of_pipeline([stage[mp_rank % slices] for stage in grid])
        module = OrderedDict(model.get(Model.MODULE) or {})
        if part.saved.stage == 3:
            module.update(_frozen(folder, part, mp_rank))
            model[Model.FROZEN_PARAM_FRAGMENTS] = model[Model.FROZEN_PARAM_SHAPES] = None
        model[Model.MODULE] = module
        yield names.model_file(mp_rank), model
        shared = model.get(Model.SHARED_PARAMS) or {}
        elsewhere = {*part.shapes, *shared}
        hollow = OrderedDict(
            (n, torch.empty(0, dtype=v.dtype, device="cpu") if n in elsewhere else v)
            for n, v in module.items()
        )
        light = {**model, Model.MODULE: hollow, Model.FROZEN_PARAM_FRAGMENTS: None}
        yield names.zero3_model_file(0, mp_rank), {**light, Model.FROZEN_PARAM_SHAPES: None}


def _not_stepped(folder: Folder, stepped: Container[str]) -> Iterator[tuple[str, Any]]:
    """A pipeline's layers, for what no optimizer steps, and experts' files without what is under `zero`."""
    yield from ((file, folder.load(file)) for file in folder.glob(names.LAYER_FILES))
    for file in (name for pattern in names.expert_files() for name in folder.glob(pattern)):
        found = folder.load(file).items()
        if rest := OrderedDict((n, v) for n, v in found if stack_of(n) not in stepped):
            yield file, rest


def _frozen(folder: Folder, part: _Part, mp_rank: int) -> dict[str, torch.Tensor]:
    """The frozen parameters of stage 3, put together."""
    weights = of_frozen(part.model, part.saved.world, folder.load, mp_rank)
    return {name: weight.whole() for name, weight in weights.items()}


def _shapes_of_pipeline(stages: Sequence[_Part]) -> list[OrderedDict[str, torch.Size]]:
    """Shapes by group of all pipeline stages: which of them a rank will have is open."""
    groups: list[OrderedDict[str, torch.Size]] = []
    for part in stages:
        for number, group in enumerate(_shapes_by_group(part)):
            groups += [OrderedDict()] if number == len(groups) else []
            groups[number].update((n, s) for n, s in group.items() if n not in groups[number])
    return groups


def _shapes_by_group(part: _Part) -> list[OrderedDict[str, torch.Size]]:
    """Shapes as they were saved, and those of other ranks' experts with the group of this rank's."""
    saved = part.model.get(Model.PARAM_SHAPES) or part.common[Zero.WRAPPER_NAMES]
    groups = [OrderedDict((name, part.shapes[name]) for name in group) for group in saved]
    known = {name for group in groups for name in group}
    for name, pieces in part.saved.pieces.items():
        if name not in known and pieces:
            groups[min(pieces[0].slot, len(groups) - 1)][name] = part.shapes[name]
    return groups


def _left_over(
    folder: Folder, parts: Sequence[_Part], rules: MergeRules
) -> Iterator[tuple[str, Any]]:
    """Buffers, frozen and shared parameters of stages 0 to 2: upstream takes them from here.

    Of layers that tensor parallelism divided the frozen ones are put together, at all stages.
    """
    first, divided = parts[0], len(parts) > 1 and SUB_PARAM_SHARD_WIDTHS in rules.info
    buffers = set(first.model.get(Model.BUFFER_NAMES) or ())
    shared = first.model.get(Model.SHARED_PARAMS) or {}
    if first.saved.stage < 3:
        held = [part.model.get(Model.MODULE) or {} for part in parts]
    else:
        held = [_frozen(folder, part, rank) if divided else {} for rank, part in enumerate(parts)]
    for name, value in held[0].items():
        if name in first.shapes or not isinstance(value, torch.Tensor):
            continue
        whole: Any = {Universal.PARAM: value.detach()}
        if divided and name not in buffers:
            slices = [weights[name].detach() for weights in held]
            whole = rules.merge(shared.get(name, name), slices)
        yield universal_state_file(name, FP32), whole


def convert(
    input_folder: str | Path,
    output_folder: str | Path,
    workers: int = 2,
    strict: bool = True,
    inject_missing_state: bool = False,
) -> Path:
    """Write a universal checkpoint.

    Args:
        input_folder: a tag's folder.
        output_folder: the folder to make; replaced as a whole if it is there.
        workers: parameters that are put together at once.
        strict: merge rules that match no parameter are an error.
        inject_missing_state: go on without merge rules though the checkpoint is of several model-parallel ranks.

    Returns:
        The made folder.

    Raises:
        DeepSpeedCheckpointError: files are damaged, refused or contradict each other.
        NotImplementedError: experts were spread over tensor-parallel ranks as well.
        ValueError: merge rules are missing, or do not belong to the model.
    """
    folder, output = Folder(Path(input_folder)), Path(output_folder).resolve()
    grid = _open_grid(folder)
    parts = [part for stage in grid for part in stage]
    rules = _rules(parts, len(grid[0]), inject_missing_state)
    where = _stage_of_params(grid)
    size = sum(4 * 3 * part.shapes[n].numel() for part in parts for n in part.shapes)

    def write(target: Path) -> list[Entry]:
        with ThreadPoolExecutor(max(1, workers), "universal") as pool:
            jobs = [
                pool.submit(_write_all, target, _param_files(grid, rules, name, stage))
                for name, stage in where.items()
            ]
            found = [entry for job in jobs for entry in job.result()]
        found += _write_all(target, _left_over(folder, grid[0], rules))
        if strict and (unmatched := rules.unmatched()):
            raise ValueError(
                explain(
                    "merge rules match no parameter",
                    got=", ".join(unmatched),
                    fix="Correct universal_checkpoint_info, or pass --no_strict.",
                )
            )
        common = [(f"{Universal.FOLDER}/optimizer_state.pt", _common_state(parts[0]))]
        found += _write_all(target, common)
        found += _write_all(target, _not_stepped(folder, where))
        return found + _write_all(target, _model_files(folder, grid))

    try:
        return publish(
            output.parent, output.name, Crew(), write, needed=size, latest=names.LATEST_UNIVERSAL
        )
    finally:
        for part in parts:
            part.saved.close()


def _write_all(target: Path, files: Any) -> list[Entry]:
    entries = []
    for name, content in files:
        path = target / name
        if target.resolve() not in path.resolve().parents:
            raise ValueError(explain("a parameter's name cannot be a folder's", got=repr(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise ValueError(
                explain("two parameters share a folder (names that differ in case?)", got=name)
            )
        entries.append(replace(save_file(path, content), name=name))
    return entries


def _rules(parts: Sequence[_Part], slices: int, inject: bool) -> MergeRules:
    info = parts[0].model.get(Model.UNIVERSAL_INFO)
    if info is None and slices > 1 and not inject:
        raise ValueError(
            explain(
                f"the checkpoint says nothing of how the slices of {slices} tensor-parallel ranks are put together",
                got=f"no {Model.UNIVERSAL_INFO!r} in the model states",
                fix="Save with client_state={'universal_checkpoint_info': {...}}, or pass --inject_missing_state "
                "if every slice is joined along dimension 0.",
            )
        )
    default = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    rules = MergeRules(plain(info) if info is not None else default)
    if slices == 1:  # nothing to put together: rules cannot fail to match
        rules.matched.update(
            p
            for value in rules.info.values()
            if isinstance(value, list)
            for p in value
            if isinstance(p, str)
        )
    return rules


def _stage_of_params(grid: Sequence[Sequence[_Part]]) -> OrderedDict[str, int]:
    """Where each parameter is read; those on several pipeline stages (tied ones) from the first."""
    where: OrderedDict[str, int] = OrderedDict()
    for stage, parts in enumerate(grid):
        for name in parts[0].shapes:
            where.setdefault(name, stage)
    return where


# - the command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.checkpoint.ds_to_universal",
        description="Turn a checkpoint of any number of ranks into a universal one.",
    )
    parser.add_argument("--input_folder", required=True, help="a tag's folder")
    parser.add_argument("--output_folder", required=True, help="the folder to make")
    parser.add_argument(
        "--num_extract_workers", type=int, default=4, help="accepted: shards are mapped, not copied"
    )
    parser.add_argument(
        "--num_merge_workers", type=int, default=2, help="parameters put together at once"
    )
    parser.add_argument(
        "--keep_temp_folder", action="store_true", help="accepted: no fragments are written"
    )
    parser.add_argument(
        "--no_strict", dest="strict", action="store_false", help="allow rules that match nothing"
    )
    parser.add_argument(
        "--inject_missing_state", action="store_true", help="go on without merge rules"
    )
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Convert as `args` say (what `parse_arguments` returns)."""
    made = convert(
        args.input_folder,
        args.output_folder,
        workers=getattr(args, "num_merge_workers", 2),
        strict=getattr(args, "strict", True),
        inject_missing_state=getattr(args, "inject_missing_state", False),
    )
    print(f"universal checkpoint in {made}")


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ValueError, OSError, DeepSpeedCheckpointError) as error:
        sys.exit(f"ds_to_universal: {error}")
