# SPDX-License-Identifier: Apache-2.0
"""Quantization to small floats, with scales of groups of values."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {".quantize": ["FP_Quantize", "Quantizer"], ".fp8_gemm": ["matmul_fp8"]}
)
