# SPDX-License-Identifier: Apache-2.0
"""Upstream's conversion in two steps: fragments of states in a folder of their own, and what joins them.

`ds_to_universal` needs no fragments; tools that write them (`<parameter>/<tensor rank>/<state>.<data rank>`) join them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import explain
from .constants import UNIVERSAL_CHECKPOINT_INFO
from .merge_slices import MergeRules
from .reader import load_file
from .writer import save_file

_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def _validate_autotp_conversion_support(universal_checkpoint_info: Mapping[str, Any]) -> None:
    """Refuse merge rules that name parameters whose slices cannot be put together.

    Raises:
        ValueError: naming them, with the reasons.
    """
    MergeRules(universal_checkpoint_info)


def _group_per_tp_shapes(
    slice_shapes: Sequence[Mapping[str, Any]], pp_degree: int, tp_degree: int
) -> dict[str, list[Any]]:
    """The shapes of each parameter by tensor-parallel rank.

    Args:
        slice_shapes: name -> shape of each model-parallel rank; all tensor-parallel ranks of a pipeline stage, then
            those of the next.
        pp_degree, tp_degree: how many stages and tensor-parallel ranks.

    Raises:
        AssertionError: stages that share a parameter disagree.
    """
    found: dict[str, list[Any]] = {}
    for index, shapes in enumerate(slice_shapes[: pp_degree * tp_degree]):
        for name, shape in shapes.items():
            by_rank = found.setdefault(name, [None] * tp_degree)
            known = by_rank[index % tp_degree]
            if known is not None and tuple(known) != tuple(shape):
                raise AssertionError(
                    explain(
                        f"pipeline stages disagree on shape of {name!r}",
                        got=f"{tuple(known)} and {tuple(shape)}",
                    )
                )
            by_rank[index % tp_degree] = shape
    return found


def _merge_zero_shards(
    param_base_path: str | Path, state: str, tp_degree: int, slice_shape: Any
) -> list[torch.Tensor]:
    """One state of a parameter on each tensor-parallel rank, put together from its fragments.

    Args:
        param_base_path: the parameter's folder.
        state: name of the state.
        tp_degree: number of tensor-parallel ranks.
        slice_shape: the shape on all ranks, or a list of each rank's.

    Raises:
        AssertionError: a rank that holds elements wrote no fragment.
    """
    slices = []
    for rank in range(tp_degree):
        shape = slice_shape[rank] if isinstance(slice_shape, list) else slice_shape
        found = (Path(param_base_path) / str(rank)).glob(f"{state}.*")
        numbered = [file for file in found if file.suffix[1:].isdigit()]
        files = sorted(numbered, key=lambda file: int(file.suffix[1:]))  # "100" comes after "99"
        if not files and torch.Size(shape).numel():
            raise AssertionError(
                explain(
                    "a rank wrote no fragment of a parameter though its part is not empty",
                    got=f"no {state}.* in {Path(param_base_path) / str(rank)}",
                    expected=f"fragments of shape {tuple(shape)}",
                )
            )
        parts = [load_file(file).reshape(-1) for file in files]
        flat = torch.cat(parts) if parts else torch.empty(0, device="cpu")
        slices.append(flat.view(torch.Size(shape)))
    return slices


def merge_tp_slices(
    ds_checkpoint: Any,
    output_dir: str | Path,
    slice_dir: str | Path,
    tp_degree: int,
    name_and_shape: tuple[str, Any],
) -> set[str]:
    """Write the whole states of one parameter.

    Args:
        ds_checkpoint: the merge rules, or a `DeepSpeedCheckpoint` that has them.
        output_dir: where its folder comes.
        slice_dir: where the fragments are.
        tp_degree: number of tensor-parallel ranks.
        name_and_shape: its name, and the shape on all ranks or a list of each rank's.

    Returns:
        The patterns of the rules that do not match it.
    """
    info = ds_checkpoint
    if not isinstance(info, Mapping):
        info = ds_checkpoint.get_checkpoint_info(UNIVERSAL_CHECKPOINT_INFO)
    rules, (name, shape) = MergeRules(info or {}), name_and_shape
    folder = Path(output_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for state in _STATES:
        slices = _merge_zero_shards(Path(slice_dir) / name, state, tp_degree, shape)
        save_file(folder / f"{state}.pt", rules.merge(name, slices))
    return set(rules.unmatched())
