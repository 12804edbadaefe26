# SPDX-License-Identifier: Apache-2.0
"""Operators for models of proteins."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".evoformer_attn": ["DS4Sci_EvoformerAttention"]}
)
