# SPDX-License-Identifier: Apache-2.0
"""Legacy path of the accelerators in a checkout: the modules of deepspeed.accelerator, under their older names."""

from __future__ import annotations

import importlib
import pkgutil
import sys

_package = importlib.import_module("deepspeed.accelerator")
for _found in pkgutil.iter_modules(_package.__path__):
    if _found.name.endswith("_accelerator"):
        sys.modules[f"{__name__}.{_found.name}"] = importlib.import_module(
            f"{_package.__name__}.{_found.name}"
        )
sys.modules[__name__] = _package
