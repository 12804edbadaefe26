# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of automatically split experts (AutoEP), so that no tool drops those experts in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..utils.errors import explain
from .constants import AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY


def aggregate_autoep_metadata(models: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of all files of model states, one a layer and place; empty where no file has any.

    Raises:
        RuntimeError: a file's entries are no list of dicts.
    """
    entries: list[Mapping[str, Any]] = []
    for model in models:
        found = model.get(AUTOEP_LAYERS_KEY, model.get(AUTOEP_LAYERS_KEY_LEGACY))
        if found is None:
            continue
        if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
            raise RuntimeError(
                explain("AutoEP metadata must be a list of dicts", got=type(found).__name__)
            )
        entries += [entry for entry in found if entry not in entries]
    return entries


def refuse_autoep(models: Sequence[Mapping[str, Any]]) -> None:
    """Raise NotImplementedError for a checkpoint with automatically split experts."""
    if entries := aggregate_autoep_metadata(models):
        raise NotImplementedError(
            explain(
                "checkpoints of automatically split experts (AutoEP) cannot be converted",
                got=", ".join(str(entry.get("module_path", "?")) for entry in entries[:5]),
                fix="Convert it with the package that wrote it.",
            )
        )
