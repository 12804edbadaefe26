# SPDX-License-Identifier: Apache-2.0
"""SGD for params in the CPU's memory; each name is looked up on first use."""

from __future__ import annotations

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {".cpu_sgd": ["DeepSpeedCPUSGD"]})
