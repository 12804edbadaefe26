# SPDX-License-Identifier: Apache-2.0
"""Reads the tensor-parallel plan that a model of transformers brings (`tp_plan`) as layer rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deepspeed.utils.errors import explain

from .autotp_config import PartitionType, TPLayerSpec

_WEIGHT = r"\.weight"

# style of transformers -> fields of a rule
_STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": PartitionType.COLUMN},
    "rowwise": {"partition_type": PartitionType.ROW},
    "colwise_rep": {"partition_type": PartitionType.COLUMN, "gather_output": True},
    "colwise_gather_output": {"partition_type": PartitionType.COLUMN, "gather_output": True},
    "rowwise_rep": {"partition_type": PartitionType.ROW, "split_input": True},
    "rowwise_split_input": {"partition_type": PartitionType.ROW, "split_input": True},
    "replicate": {"partition_type": PartitionType.SKIP},
    # its result is whole on every rank, and so it is where every rank has all words
    "embedding_rowwise": {"partition_type": PartitionType.SKIP},
    "replicated_with_grad_allreduce": {
        "partition_type": PartitionType.SKIP,
        "grad_allreduce": True,
    },
}


class TPPlanConverter:
    """Turns a plan (name with wildcards -> style) into rules."""

    @staticmethod
    def convert(hf_tp_plan: Mapping[str, str]) -> list[TPLayerSpec] | None:
        """Read a plan; None for an empty one.

        Raises:
            ValueError: a style that is not known: half a plan would break the model, since layers belong in pairs.
        """
        if not hf_tp_plan:
            return None
        unknown = {name: style for name, style in hf_tp_plan.items() if style not in _STYLES}
        if unknown:
            raise ValueError(
                explain(
                    "the model's tp_plan has an unsupported partition style",
                    got=", ".join(f"{style!r} for {name!r}" for name, style in unknown.items()),
                    expected=", ".join(_STYLES),
                    fix="Say in tensor_parallel.partition_config how its layers are divided, with "
                    '"use_default_specs": false.',
                )
            )
        return [
            TPLayerSpec(patterns=[_of_weight(name)], **_STYLES[style])
            for name, style in hf_tp_plan.items()
        ]

    @staticmethod
    def _wildcard_to_regex(pattern: str) -> str:
        """A name with `*` for any part, anywhere in the model, as a regular expression."""
        return ".*" + re.escape(pattern).replace(r"\*", ".*")


def _of_weight(name: str) -> str:
    found = TPPlanConverter._wildcard_to_regex(name)
    return (found if found.endswith(_WEIGHT) else found + _WEIGHT) + "$"
