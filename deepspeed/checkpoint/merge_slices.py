# SPDX-License-Identifier: Apache-2.0
"""Putting the slices of tensor-parallel ranks together: the rules that a model writes down as lists of name patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..utils.errors import DeepSpeedCheckpointError, explain
from . import constants as keys
from .format import Universal
from .tensor_parts import checked_widths
from .universal_checkpoint import SubparamShape
from .writer import attributes


@dataclass
class MergeRules:
    """How each parameter's slices become one tensor; the first kind of pattern that matches decides.

    Attributes:
        info: a model file's `universal_checkpoint_info`.
        matched: the patterns that matched something so far.
    """

    info: Mapping[str, Any]
    matched: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if patterns := self.info.get(keys.AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS):
            raise ValueError(
                explain(
                    "the checkpoint holds parameters whose slices cannot be put together",
                    got=", ".join(_with_reasons(patterns)),
                    fix="Load it with the number of tensor-parallel ranks that saved it.",
                )
            )

    def unmatched(self) -> list[str]:
        """Patterns that no parameter matched: a sign that rules and model do not belong together."""
        return [p for kind in _PATTERN_KEYS for p in self._patterns(kind) if p not in self.matched]

    def merge(self, name: str, slices: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The content of a state file.

        Args:
            name: the parameter's.
            slices: one state of it on each tensor-parallel rank, in the parameter's shape there.

        Raises:
            DeepSpeedCheckpointError: slices that should be equal are not.
            AssertionError: slices of joined weights are uneven, and nobody wrote down how.
        """
        if self._matches(name, keys.TP_REPLICATED_PARAMETER_PATTERNS):
            if any(not torch.equal(slices[0], other) for other in slices[1:]):
                raise DeepSpeedCheckpointError(
                    explain(f"copies of {name!r} on tensor-parallel ranks are not equal")
                )
            return {Universal.PARAM: slices[0]}
        if self._matches(name, keys.PARAMETER_TO_AVERAGE_PATTERNS):
            return {Universal.PARAM: sum(slices[1:], start=slices[0]) / len(slices)}
        if self._matches(name, keys.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0):
            return _joined_by_sub_params(slices, 2)
        if shape := self._sub_params(name):
            version = self.info.get(keys.UNIVERSAL_CHECKPOINT_VERSION_KEY)
            return _joined_by_shape(slices, shape, self._widths(name), version)
        dim = 1 if self._matches(name, keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS) else 0
        if slices[0].dim() == 0:
            return {Universal.PARAM: slices[0]}
        whole = slices[0] if len(slices) == 1 else torch.cat(list(slices), dim)
        merged = {Universal.CAT_DIM: dim, Universal.PARAM: whole}
        if self._matches(name, keys.VOCABULARY_PARAMETER_PATTERNS):
            merged[Universal.PARAM] = whole[: self.info[keys.ORIGINAL_VOCAB_SIZE]]
            merged[Universal.VOCAB] = True
        return merged

    def _patterns(self, kind: str) -> list[str]:
        return list(self.info.get(kind) or ())

    def _matches(self, name: str, kind: str) -> bool:
        found = {pattern for pattern in self._patterns(kind) if re.match(pattern, name)}
        self.matched |= found
        return bool(found)

    def _sub_params(self, name: str) -> SubparamShape | None:
        for entry in self.info.get(keys.PARAMETER_WITH_SUB_PARAMS) or ():
            fields = entry if isinstance(entry, Mapping) else vars(entry)
            if any(re.match(pattern, name) for pattern in fields["patterns"]):
                return SubparamShape(**{k: fields[k] for k in _SUB_PARAM_FIELDS})
        return None

    def _widths(self, name: str) -> Any:
        """What each rank has of each of a parameter's joined weights, where that was written down."""
        known = self.info.get(keys.SUB_PARAM_SHARD_WIDTHS) or {}
        return next((widths for pattern, widths in known.items() if re.match(pattern, name)), None)


def _with_reasons(patterns: Any) -> list[str]:
    if isinstance(patterns, Mapping):
        return [f"{pattern} ({reason})" for pattern, reason in patterns.items()]
    return list(patterns)


_SUB_PARAM_FIELDS = ("patterns", "shape", "partition_dim")
_PATTERN_KEYS = (
    keys.TP_REPLICATED_PARAMETER_PATTERNS,
    keys.PARAMETER_TO_AVERAGE_PATTERNS,
    keys.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0,
    keys.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    keys.VOCABULARY_PARAMETER_PATTERNS,
)


def _joined_by_sub_params(slices: Sequence[torch.Tensor], count: int) -> dict[str, Any]:
    chunks = [part.chunk(count, 0) for part in slices]
    whole = torch.cat([chunk[i] for i in range(count) for chunk in chunks], 0)
    return {Universal.CAT_DIM: 0, Universal.PARAM: whole, Universal.N_SUB_PARAMS: count}


def _joined_by_shape(
    slices: Sequence[torch.Tensor], shape: SubparamShape, widths: Any, version: Any
) -> dict[str, Any]:
    dim, as_given = shape.partition_dim, len(shape.shape) == slices[0].dim()
    sizes = _sizes(shape.shape[dim], sum(part.shape[dim] for part in slices) if as_given else None)
    per_rank = checked_widths(sizes, widths, len(slices), version)
    parts = []
    for rank, part in enumerate(slices):
        own = [w[rank] for w in per_rank]
        if not as_given:
            view = [sum(n) if isinstance(n, (tuple, list)) else int(n) for n in shape.shape]
            view[dim] = sum(own)
            part = part.reshape(view)
        parts.append(part.split(own, dim))
    whole = torch.cat([part[i] for i in range(len(sizes)) for part in parts], dim)
    if not as_given and slices[0].dim() > 0:
        whole = whole.reshape(-1, *slices[0].shape[1:])
    final = tuple(tuple(sizes) if at == dim else n for at, n in enumerate(shape.shape))
    rule = {name: getattr(shape, name) for name in _SUB_PARAM_FIELDS} | {"shape": final}
    return {Universal.PARAM: whole, Universal.SUB_PARAM_SHAPE: attributes(**rule)}


def _sizes(entry: Any, total: int | None) -> list[int]:
    """Sizes of joined weights: given one by one, or as the number of equal ones; the whole size is a single one."""
    if isinstance(entry, (tuple, list)):
        return [int(n) for n in entry]
    count = int(entry)
    if total is None or count in (total, -1):
        return [count if total is None else total]
    return [total // count] * count
