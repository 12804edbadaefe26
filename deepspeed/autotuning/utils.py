# SPDX-License-Identifier: Apache-2.0
"""Looks keys up in nested dictionaries, wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any


def get_val_by_key(d: Mapping[str, Any], k: str) -> Any:
    """The value of ``k`` in ``d``, or in the first of its nested dictionaries that has it; None without one."""
    if k in d:
        return d[k]
    for value in d.values():
        found = get_val_by_key(value, k) if isinstance(value, Mapping) else None
        if found is not None:
            return found
    return None


def set_val_by_key(d: MutableMapping[str, Any], k: str, vd: Any) -> None:
    """Set ``k`` to ``vd`` in ``d`` and in all of its nested dictionaries, where it is there already."""
    if k in d:
        d[k] = vd
    for value in d.values():
        if isinstance(value, MutableMapping):
            set_val_by_key(value, k, vd)
