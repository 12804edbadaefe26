# SPDX-License-Identifier: Apache-2.0
"""What tensor-parallel layers tell checkpoints: of each parameter how it was cut, and of a model how its parts are joined.

Each parameter of a layer carries a dict (`DS_AUTOTP_UC_META`) from which a rank finds its part of a whole state; its
entry "conversion" is what `collect_autotp_universal_checkpoint_info` makes the merge rules of a checkpoint from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepspeed.checkpoint import constants as keys

DS_AUTOTP_UC_META = keys.DS_AUTOTP_UC_META

_VOCABULARIES = ("lm_head", "embed_out", "embed_tokens", "word_embeddings", "wte")


def _build_param_uc_restore_meta(
    *,
    partition_type: str,
    partition_dim: int | None,
    logical_shape: Sequence[int],
    output_shape: Sequence[int] | None = None,
    sub_param_shape: Sequence[Any] | None = None,
    sub_param_sizes: Sequence[int] | None = None,
    sub_param_shard_widths: Sequence[Sequence[int]] | None = None,
    partition_sizes: Sequence[int] | None = None,
    target_partition_shape: Sequence[int] | None = None,
    original_shape: Sequence[int] | None = None,
    is_bias: bool = False,
    replicated: bool = False,
    unsupported_reason: str | None = None,
) -> dict[str, Any]:
    """What a parameter carries.

    Args:
        partition_type: "column" or "row".
        partition_dim: the divided dimension; None for none.
        logical_shape, original_shape: shape of the whole.
        output_shape: the layer's outputs.
        sub_param_shape, sub_param_sizes, sub_param_shard_widths: of joined weights: the rule's shape, their sizes, and
            of each its size on each rank.
        partition_sizes: size on each rank of one that is not joined.
        target_partition_shape: shape on this rank.
        is_bias, replicated: whether it is a bias; whether all ranks hold it.
        unsupported_reason: why its parts cannot be joined.
    """
    shape = _tuple(sub_param_shape)
    widths = None if sub_param_shard_widths is None else [list(w) for w in sub_param_shard_widths]
    return {
        keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: keys.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        "partition_type": partition_type,
        "partition_dim": partition_dim,
        "logical_shape": _tuple(logical_shape),
        "output_shape": _tuple(output_shape),
        "sub_param_shape": shape,
        "sub_param_sizes": _tuple(sub_param_sizes),
        "sub_param_shard_widths": widths,
        "partition_sizes": _tuple(partition_sizes),
        "target_partition_shape": _tuple(target_partition_shape),
        "original_shape": _tuple(original_shape),
        "is_bias": is_bias,
        "replicated": replicated,
        "conversion": {
            "partition_type": partition_type,
            "partition_dim": partition_dim,
            "sub_param_shape": shape,
            "sub_param_shard_widths": widths,
            "original_shape": _tuple(original_shape),
            "is_bias": is_bias,
            "replicated": replicated,
            "unsupported_reason": unsupported_reason,
        },
    }


def _get_param_uc_conversion_meta(param: torch.Tensor) -> Mapping[str, Any] | None:
    """What the merge rules say of a parameter; None for one that no tensor-parallel layer holds."""
    found = getattr(param, DS_AUTOTP_UC_META, None)
    return None if found is None else found["conversion"]


def collect_autotp_universal_checkpoint_info(model: torch.nn.Module) -> dict[str, Any]:
    """Make the merge rules of a model's checkpoints (`universal_checkpoint_info`).

    Parameters of other layers are equal on all ranks.
    """
    info: dict[str, Any] = {
        keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: keys.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        keys.TP_REPLICATED_PARAMETER_PATTERNS: [],
        keys.PARAMETER_TO_AVERAGE_PATTERNS: [],
        keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [],
        keys.VOCABULARY_PARAMETER_PATTERNS: [],
        keys.PIPELINE_REPLICATED_PARAMETER_PATTERNS: [],
        keys.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: [],
        keys.PARAMETER_WITH_SUB_PARAMS: [],
        keys.SUB_PARAM_SHARD_WIDTHS: {},
        keys.AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS: {},
    }
    for name, param in model.named_parameters():
        _add_param(info, name, _get_param_uc_conversion_meta(param))
    return info


def _add_param(info: dict[str, Any], name: str, meta: Mapping[str, Any] | None) -> None:
    pattern = f"^{re.escape(name)}$"
    if meta is not None and meta["unsupported_reason"]:
        info[keys.AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS][pattern] = meta["unsupported_reason"]
    elif meta is None or meta["replicated"] or meta["partition_dim"] is None:
        info[keys.TP_REPLICATED_PARAMETER_PATTERNS].append(pattern)
    elif meta["sub_param_shard_widths"]:
        widths, dim = meta["sub_param_shard_widths"], meta["partition_dim"]
        shape = list(meta["sub_param_shape"] or meta["original_shape"])
        shape[dim] = tuple(sum(per_rank) for per_rank in widths)
        entry = {"patterns": [pattern], "shape": shape, "partition_dim": dim}
        info[keys.PARAMETER_WITH_SUB_PARAMS].append(entry)
        info[keys.SUB_PARAM_SHARD_WIDTHS][pattern] = [list(per_rank) for per_rank in widths]
    elif meta["partition_dim"] == 1:
        info[keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS].append(pattern)
    elif _is_vocabulary(info, name, meta):
        info[keys.VOCABULARY_PARAMETER_PATTERNS].append(pattern)
        info[keys.ORIGINAL_VOCAB_SIZE] = meta["original_shape"][0]


def _is_vocabulary(info: Mapping[str, Any], name: str, meta: Mapping[str, Any]) -> bool:
    """Whether a weight is divided by words; all such ones have the size of the first."""
    owner = name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    words = meta["original_shape"][0]
    same = info.get(keys.ORIGINAL_VOCAB_SIZE, words) == words
    return owner in _VOCABULARIES and not meta["is_bias"] and same


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    if values is None:
        return None
    return tuple(tuple(n) if isinstance(n, (list, tuple)) else n for n in values)
