# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of automatically split experts (AutoEP), so that no tool drops those experts in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..utils.errors import explain
from .constants import AUTOEP_LAYERS_KEY, AUTOEP_LAYERS_KEY_LEGACY, FOLDING_METADATA_KEY


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


FIELDS = ("moe_layer_id", "module_path", "num_experts", "num_local_experts", "ep_size")
"""What an entry has at least."""


def check_entries(entries: Any) -> None:
    """Refuse what no save wrote as the entries of layers; None is none.

    Raises:
        RuntimeError: it is malformed, or fields are missing.
    """
    if entries is None:
        return
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise RuntimeError(
            explain(
                "the AutoEP metadata is malformed",
                got=type(entries).__name__,
                expected="a list of dicts",
            )
        )
    for entry in entries:
        if lacking := [field for field in FIELDS if field not in entry]:
            raise RuntimeError(
                explain("the AutoEP metadata has missing fields", got=f"no {', '.join(lacking)}")
            )


def refuse_folded(models: Iterable[Mapping[str, Any]]) -> None:
    """Raise NotImplementedError for a checkpoint whose experts are spread over tensor-parallel ranks as well."""
    if any(model.get(FOLDING_METADATA_KEY) for model in models):
        raise NotImplementedError(
            explain(
                "checkpoints of folded AutoEP+AutoTP expert shards cannot be converted",
                fix="load it with the sizes that saved it",
            )
        )
