# SPDX-License-Identifier: Apache-2.0
"""The search for a fast ZeRO stage and batch size."""

from ..utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".autotuner": ["Autotuner"], ".scheduler": ["ResourceManager"]}
)
