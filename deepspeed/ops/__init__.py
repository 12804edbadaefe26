# SPDX-License-Identifier: Apache-2.0
"""Native operators and the optimizers over them; subpackages and names are looked up on first use."""

from __future__ import annotations

import importlib

_PACKAGES = (
    "adagrad",
    "adam",
    "aio",
    "deepspeed4science",
    "fp_quantizer",
    "lamb",
    "lion",
    "op_builder",
    "quantizer",
    "sgd",
    "sparse_attention",
)


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__compatible_ops__":
        table = importlib.import_module(f"{__name__}.op_builder.all_ops")
        return table.compatible_ops()
    raise AttributeError(f"module {__name__} has no attribute {name}")
