# SPDX-License-Identifier: Apache-2.0
"""Spread experts of a checkpoint put together, and what its files say of ranks that share experts and layers.

The converter reads shards as they are (`checkpoint.reshard`); the functions that consolidate are for callers that have
cut a checkpoint into fragments, or have files of single experts, themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..comm.mesh import expert_grid
from ..utils.errors import explain
from . import constants as keys
from .autoep_metadata import aggregate_autoep_metadata, check_entries
from .format import universal_state_file
from .reader import load_file
from .stacked_experts import WEIGHTS, stacked_names, universal_stack
from .writer import save_file

_STATES = ("fp32", "exp_avg", "exp_avg_sq")
_FOLDING_VERSION = 1


# - putting together


def _zero12_fragment_path(temp_dir: str, param_name: str, state: str, dp_rank: int) -> str:
    """Where a data-parallel rank's fragment of a state lies, in front of tensor-parallel rank 0."""
    return str(Path(temp_dir) / param_name / "0" / f"{state}.{dp_rank:02d}")


def consolidate_autoep_zero12_expert_states(
    temp_dir: str,
    output_dir: str,
    metadata: Mapping[str, Mapping[str, Any]],
    local_shapes: Mapping[str, Sequence[int]],
    dp_size: int,
    tp_size: int = 1,
    data_first: bool = False,
) -> None:
    """Write universal states of stacked experts from the fragments of ZeRO 1 or 2.

    Args:
        temp_dir: folder of the fragments, see `_zero12_fragment_path`.
        output_dir: the universal folder.
        metadata: `num_experts`, `num_local_experts` and `ep_size` by parameter name.
        local_shapes: a rank's shape by parameter name.
        dp_size: number of ranks.
        tp_size: must be 1.
        data_first: ranks with the same experts were numbered side by side.

    Raises:
        NotImplementedError: tensor-parallel ranks.
    """
    if tp_size != 1:
        raise _folded()
    for name, entry in metadata.items():
        shape = torch.Size(local_shapes[name])
        _, copies = expert_grid([tuple(range(dp_size))], int(entry["ep_size"]), data_first)
        for state in (*_STATES, "step"):
            parts = []
            for ranks in copies:
                paths = [Path(_zero12_fragment_path(temp_dir, name, state, r)) for r in ranks]
                parts.append([load_file(path) for path in paths if path.is_file()])
            if not any(parts):
                continue
            target = Path(output_dir) / universal_state_file(name, state)
            if state == "step":
                _save(target, parts[0][0])
                continue
            local = [torch.cat([p.reshape(-1) for p in found])[: shape.numel()] for found in parts]
            _save(target, universal_stack(torch.cat([part.view(shape) for part in local])))


def consolidate_autoep_expert_files(
    checkpoint_dir: str, output_dir: str, entries: Sequence[Mapping[str, Any]]
) -> None:
    """Write universal weights of stacked experts from the files of single experts.

    Raises:
        NotImplementedError: the experts were spread over tensor-parallel ranks as well.
        RuntimeError: an expert's file is missing.
    """
    for entry in entries:
        stacks: dict[str, list[torch.Tensor]] = {weight: [] for weight in WEIGHTS}
        for expert in range(int(entry["num_experts"])):
            pattern = f"layer_{entry['moe_layer_id']}_expert_{expert}_mp_rank_*_model_states.pt"
            files = sorted(Path(checkpoint_dir).glob(pattern))
            if not files:
                raise RuntimeError(
                    explain(f"a file is missing in {checkpoint_dir}", expected=pattern)
                )
            state = load_file(files[0])
            if len(files) > 1 or keys.FOLDING_METADATA_KEY in state:
                raise _folded()
            for weight, found in stacks.items():
                found.append(state[f"{entry['expert_key_prefix']}.{weight}.{expert}"].float())
        for weight, found in stacks.items():
            name = f"{entry['expert_key_prefix']}.{weight}"
            target = Path(output_dir) / universal_state_file(name, "fp32")
            _save(target, universal_stack(torch.stack(found)))


def _save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(path, content)


def _folded() -> NotImplementedError:
    return NotImplementedError(
        explain(
            "folded AutoEP+AutoTP expert shards cannot be put together",
            fix="load the checkpoint with the sizes that saved it",
        )
    )


# - files of stage 3


def _get_zero3_model_state_files(checkpoint_dir: str) -> list[str]:
    """The ranks' model files of stage 3, in the order of the ranks."""

    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(found[1]) if found else -1

    files = Path(checkpoint_dir).glob("*zero_pp_rank_*_mp_rank_*_model_states.pt")
    return [str(path) for path in sorted(files, key=rank)]


def _autoep_expert_param_names_by_rank(
    model_files: Sequence[str],
) -> tuple[set[str], dict[int, list[Mapping[str, Any]]]]:
    """Names of all stacked experts, and what each rank's file says of its layers."""
    by_rank = {i: aggregate_autoep_metadata([load_file(f)]) for i, f in enumerate(model_files)}
    return {name for entries in by_rank.values() for name in stacked_names(entries)}, by_rank


def _uses_zero3_partitioned_autoep_metadata(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether experts are in the ranks' shards, not in files of their own.

    Raises:
        RuntimeError: the entries are malformed, or of a version to come.
    """
    check_entries(list(entries))
    for entry in entries:
        if (
            entry.get(keys.AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY)
            != keys.AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT
        ):
            return False
        version = entry.get(keys.AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION_KEY)
        if version != keys.AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION:
            raise RuntimeError(
                explain(
                    "experts of ZeRO stage 3 in an unknown form",
                    got=f"version {version}",
                    expected=keys.AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION,
                )
            )
    return bool(entries)


# - ranks that share experts and layers


def make_folding_metadata(
    *,
    tp_size: int,
    tp_rank: int,
    ep_size: int,
    ep_rank: int,
    zero_partition_group: str,
    zero_partition_rank: int,
    zero_partition_count: int,
    family: str,
    etp_size: int = 1,
    etp_rank: int = 0,
    param_families: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a file says of the ranks that shared experts and layers when it was saved."""
    made: dict[str, Any] = {
        "version": _FOLDING_VERSION,
        keys.FOLDING_TP_SIZE: tp_size,
        keys.FOLDING_TP_RANK: tp_rank,
        keys.FOLDING_EP_SIZE: ep_size,
        keys.FOLDING_EP_RANK: ep_rank,
        keys.FOLDING_ETP_SIZE: etp_size,
        keys.FOLDING_ETP_RANK: etp_rank,
        keys.FOLDING_ZERO_PARTITION_GROUP: zero_partition_group,
        keys.FOLDING_ZERO_PARTITION_RANK: zero_partition_rank,
        keys.FOLDING_ZERO_PARTITION_COUNT: zero_partition_count,
        keys.FOLDING_DISPATCH_STRATEGY: "route_full_partition_dispatch",
        keys.FOLDING_SHARED_EXPERT_PLACEMENT: "tp_sharded",
        keys.FOLDING_FAMILY: family,
    }
    if param_families is not None:
        made[keys.FOLDING_PARAM_FAMILIES] = dict(param_families)
    return made


def validate_folding_metadata(
    state: Mapping[str, Any], *, tp_size: int, ep_size: int, etp_size: int = 1, **more: Any
) -> Mapping[str, Any]:
    """Compare what a file says with this run.

    Args:
        state: the file's content.
        tp_size, ep_size, etp_size: this run's.
        more: other entries as they must be.

    Returns:
        What the file says.

    Raises:
        RuntimeError: it says nothing, or something else.
    """
    found = state.get(keys.FOLDING_METADATA_KEY)
    if not isinstance(found, Mapping):
        raise RuntimeError(
            explain(
                "Missing AutoEP+AutoTP folding metadata",
                expected=f"an entry {keys.FOLDING_METADATA_KEY!r}, as folded runs save it",
                fix="load a checkpoint of a run with the same autotp_size and autoep_size",
            )
        )
    expected = {"tp_size": tp_size, "ep_size": ep_size, "etp_size": etp_size, **more}
    for key, value in expected.items():
        if found.get(key) != value:
            raise RuntimeError(
                explain(
                    f"the checkpoint is of another {key} in AutoEP+AutoTP folding",
                    got=found.get(key),
                    expected=value,
                )
            )
    return found


def check_folding(
    state: Mapping[str, Any], folding_spec: Any, **expected: Any
) -> Mapping[str, Any] | None:
    """The same for a run that may not be folded itself.

    Raises:
        RuntimeError: one of the file and the run is folded and the other is not, or they differ.
    """
    if folding_spec is None:
        if state.get(keys.FOLDING_METADATA_KEY) is not None:
            raise RuntimeError(
                explain(
                    "the checkpoint is of AutoEP+AutoTP folding and requires a folded runtime",
                    fix="set the autotp_size and autoep_size that saved it",
                )
            )
        return None
    return validate_folding_metadata(
        state, tp_size=folding_spec.tp_size, ep_size=folding_spec.ep_size, **expected
    )
