# SPDX-License-Identifier: Apache-2.0
"""The training runtime; its modules are reached as attributes without importing them first."""

from __future__ import annotations

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        f".{name}": ["*"]
        for name in (
            "base_optimizer",
            "config",
            "config_utils",
            "dataloader",
            "engine",
            "lr_schedules",
            "utils",
            "zero",
        )
    },
)
