# SPDX-License-Identifier: Apache-2.0
"""Universal checkpoints: one folder a parameter, whole states in it, so that any number of ranks reads what it needs.

[Note: Universal folder]
`zero/<parameter>/fp32.pt`, `exp_avg.pt`, … hold a whole state each: `{"param": tensor, ...}` with rules for cutting it over
tensor-parallel ranks, or the bare tensor, flat (as upstream writes it from stage 3). `step.pt` is a number.
`zero/optimizer_state.pt` holds what all parameters have in common. Model-states files lie beside `zero`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import DeepSpeedCheckpointError, explain
from .format import Universal, Zero, universal_state_file
from .reader import Folder, load_file
from .reshard import FP32, Piece, SavedState, Slot, hyper_by_name, scaler_numbers
from .stacked_experts import check_total
from .tensor_parts import _get_param_uc_restore_meta as _get_param_uc_restore_meta
from .tensor_parts import _narrow_sub_params as _narrow_sub_params
from .tensor_parts import _resolve_autotp_partition as _resolve_autotp_partition
from .tensor_parts import part_of

_KEPT_OPEN = 256
_COMMON = "optimizer_state.pt"


@dataclass
class SubparamShape:
    """A parameter that several are joined in, each of which tensor parallelism cuts by itself.

    Attributes:
        patterns: regular expressions that match the names of such parameters.
        shape: the whole shape; the cut dimension is a tuple of the joined sizes.
        partition_dim: the dimension that is cut.

    Example:
        >>> SubparamShape(patterns=[r".*qkv\\.weight"], shape=((64, 16, 16), 64), partition_dim=0)
    """

    patterns: list[str]
    shape: tuple[Any, ...]
    partition_dim: int


# - cutting a whole state over tensor-parallel ranks


def cut_for_rank(
    saved: Mapping[str, Any],
    rank: int,
    size: int,
    shape: torch.Size | None = None,
    cut: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """One tensor-parallel rank's part of a saved state.

    Args:
        saved: what a state file holds.
        rank, size: which part of how many.
        shape: shape of the part, where it is known; a vocabulary is padded to it.
        cut: what the parameter says itself of how it was cut; it goes before what the file says. The part is flat then.

    Raises:
        DeepSpeedCheckpointError: the whole does not divide into such parts.
    """
    whole = saved[Universal.PARAM]
    if cut is not None:
        return part_of(cut, whole, rank, size)
    if size == 1 and not saved.get(Universal.VOCAB):
        return whole
    if shape is not None and whole.shape == shape:
        return whole  # the same on all ranks
    dim = int(saved.get(Universal.CAT_DIM, 0))
    if saved.get(Universal.VOCAB) and shape is not None:
        missing = shape[0] * size - whole.shape[0]
        whole = torch.nn.functional.pad(whole, [0, 0] * (whole.dim() - 1) + [0, max(0, missing)])
    sizes = [whole.shape[dim]]
    if (joined := saved.get(Universal.SUB_PARAM_SHAPE)) is not None:
        dim = int(joined.partition_dim)
        whole = whole.view([_total(n) for n in joined.shape])
        sizes = _listed(joined.shape[dim])
    elif (count := int(saved.get(Universal.N_SUB_PARAMS, 1))) > 1:
        sizes = [whole.shape[dim] // count] * count
    if any(n % size for n in sizes):
        raise DeepSpeedCheckpointError(
            explain(
                "a saved parameter cannot be cut over the tensor-parallel ranks",
                got=f"dimension {dim} of {sizes} elements",
                expected=f"a multiple of {size}",
            )
        )
    parts = [part.chunk(size, dim)[rank] for part in whole.split(sizes, dim)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _total(size: Any) -> int:
    return sum(_listed(size))


def _listed(size: Any) -> list[int]:
    return [int(n) for n in size] if isinstance(size, (tuple, list)) else [int(size)]


# - reading


def open_universal(
    folder: Folder,
    shapes: Mapping[str, torch.Size],
    groups: Sequence[Sequence[str]],
    tensor_rank: int = 0,
    tensor_size: int = 1,
    cuts: Mapping[str, Mapping[str, Any]] | None = None,
    experts: Mapping[str, tuple[int, int]] | None = None,
) -> SavedState:
    """See a universal folder as a saved optimizer.

    Args:
        folder: the tag.
        shapes: shape of each parameter that is wanted, on this tensor-parallel rank.
        groups: parameter names of each saved param group (flat group), in order.
        tensor_rank, tensor_size: this rank among those that cut single parameters.
        cuts: what parameters say themselves of how they were cut; it goes before what the files say.
        experts: this rank among those that share stacked experts, and their number, by name.

    Raises:
        DeepSpeedCheckpointError: it is no universal folder, or a state in it has another size.
        ValueError: it has another number of experts.
    """
    if not folder.has(f"{Universal.FOLDER}/{_COMMON}"):
        raise DeepSpeedCheckpointError(
            explain(
                f"{folder.path} is no universal checkpoint",
                got=f"no {Universal.FOLDER}/{_COMMON} in it",
                fix="Make one by python -m deepspeed.checkpoint.ds_to_universal --input_folder TAG_FOLDER "
                "--output_folder NEW_FOLDER, or take checkpoint.load_universal out of the configuration.",
            )
        )
    common = folder.load(f"{Universal.FOLDER}/{_COMMON}")
    held = {n: shape for n, shape in shapes.items() if folder.has(universal_state_file(n, FP32))}
    step = _common_step(common)
    names = list(held)
    number = {name: index for index, name in enumerate(names)}

    def open_one(index: int) -> list[Slot]:
        name, ranks = names[index], (tensor_rank, tensor_size)
        cut, share = (cuts or {}).get(name), (experts or {}).get(name)
        return [_slot(folder, name, held[name], step, ranks, cut, share)]

    return SavedState(
        pieces={
            name: [Piece(0, number[name], 0, 0, shape.numel())] if shape.numel() else []
            for name, shape in held.items()
        },
        hyper=hyper_by_name(common, groups),
        scaler=scaler_numbers(common),
        stage=int(common.get(Zero.STAGE, 1)),
        world=1,
        has_masters=True,
        open_shard=open_one,
        kept_open=_KEPT_OPEN,
        shapes=held,
    )


def _common_step(common: Mapping[str, Any]) -> Any:
    """The step count of all parameters, where it is not kept by parameter (stage 3 of upstream)."""
    inner = common.get(Zero.INNER)
    states = inner.get("state", {}) if isinstance(inner, Mapping) else {}
    found = [state["step"] for state in states.values() if "step" in state]
    return found[0] if found else None


def _slot(
    folder: Folder,
    name: str,
    shape: torch.Size,
    step: Any,
    tensor: tuple[int, int],
    cut: Mapping[str, Any] | None = None,
    share: tuple[int, int] | None = None,
) -> Slot:
    slot = Slot({}, {} if step is None else {"step": step})
    for path in folder.glob_in(f"{Universal.FOLDER}/{name}", "*.pt"):
        saved = folder.load(path)
        key = Path(path).stem
        if isinstance(saved, torch.Tensor) and saved.dim() > 0:
            saved = {Universal.PARAM: saved}
        if not isinstance(saved, Mapping):
            slot.numbers[key] = saved
            continue
        if share is not None:
            part = _of_experts(name, saved[Universal.PARAM], shape, *share)
        else:
            part = cut_for_rank(saved, *tensor, shape, cut)
        if part.numel() != shape.numel():
            raise DeepSpeedCheckpointError(
                explain(
                    f"a state of parameter {name!r} has another size",
                    got=f"{part.numel()} elements in {folder.path / path}",
                    expected=f"{shape.numel()}, of shape {tuple(shape)}",
                )
            )
        slot.tensors[key] = part.reshape(-1)
    return slot


def _of_experts(
    name: str, whole: torch.Tensor, shape: torch.Size, rank: int, ranks: int
) -> torch.Tensor:
    if whole.shape[1:] == shape[1:]:
        check_total(name, whole.shape[0], shape[0], ranks)
    return whole[rank * shape[0] : (rank + 1) * shape[0]]


# - the public functions around single parameters


def load_hp_checkpoint_state(
    self: torch.nn.Parameter,
    folder: str | Path,
    tp_rank: int,
    tp_world_size: int,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> Any:
    """Load this rank's part of a parameter's master weight and states; bound to parameters.

    Args:
        self: a parameter of a sharded optimizer.
        folder: the parameter's folder, `<tag>/zero/<name>`.
        tp_rank, tp_world_size: this rank among those that cut single parameters.
        ep_rank, ep_size: accepted; experts have names, and so folders, of their own.

    Returns:
        The saved step count, None where the folder holds none.
    """
    from ..utils.tensor_fragment import safe_set_full_fp32_param, safe_set_full_optimizer_state

    step, cut = None, _get_param_uc_restore_meta(self)
    for path in sorted(Path(folder).glob("*.pt")):
        saved = load_file(path)
        if isinstance(saved, torch.Tensor) and saved.dim() > 0:
            saved = {Universal.PARAM: saved if cut else saved.view(self.shape)}
        if not isinstance(saved, Mapping):
            step = saved if path.stem == "step" else step
            continue
        value = cut_for_rank(saved, tp_rank, tp_world_size, self.shape, cut).view(self.shape)
        value = value.to(self.device)
        if path.stem == FP32:
            safe_set_full_fp32_param(self, value)
        else:
            safe_set_full_optimizer_state(self, value, path.stem)
    return step


def enable_universal_checkpoint(param_list: Iterable[torch.nn.Parameter]) -> None:
    """Give parameters the method `load_hp_checkpoint_state`."""
    bind: Callable[..., Any] = types.MethodType
    for param in param_list:
        param.load_hp_checkpoint_state = bind(load_hp_checkpoint_state, param)  # type: ignore[attr-defined]
