# SPDX-License-Identifier: Apache-2.0
"""``ds_io`` and ``ds_nvme_tune``: how fast a folder's disk is, and with which settings; looked up on first use."""

from __future__ import annotations

import importlib

_HOMES = {"ds_io_main": "ds_io", "ds_nvme_tune_main": "tune"}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
