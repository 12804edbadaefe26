# SPDX-License-Identifier: Apache-2.0
"""Optimizers that reduce by themselves, one bit an element, once their variance has settled."""

from __future__ import annotations

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {".adam": ["OnebitAdam"], ".lamb": ["OnebitLamb"], ".zoadam": ["ZeroOneAdam"]},
)
