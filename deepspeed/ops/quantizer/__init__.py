# SPDX-License-Identifier: Apache-2.0
"""Rounding of tensors to what few bits can hold."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {".quantizer": ["ds_quantizer"]})
