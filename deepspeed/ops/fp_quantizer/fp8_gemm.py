# SPDX-License-Identifier: Apache-2.0
"""`matmul_fp8`: a product with a weight that is kept in fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.ops.fp_quantizer.quantize import FP_Quantize


def matmul_fp8(
    inp: Tensor, weight: Tensor, scale: Tensor, quantization_group_size: int, quantizer: FP_Quantize
) -> Tensor:
    """Return ``inp @ weight`` in the input's dtype.

    Args:
        inp: `[..., in]`.
        weight: `[in, out]` in fp8, from ``quantizer.quantize(..., return_meta_tensor=True)``.
        scale: ``quantizer.get_scales()``: fp32, one a group.
        quantization_group_size: values of a group, neighbours in memory.
        quantizer: what quantized the weight.

    Raises:
        ValueError: the groups do not fill the weight.
    """
    if scale.numel() * quantization_group_size != weight.numel():
        raise ValueError(
            f"the scales do not fit the weight: {scale.numel()} groups of {quantization_group_size} "
            f"values for a weight of {weight.numel()}. Give the size that it was quantized with."
        )
    kept = scale.float().contiguous().view(torch.uint8)
    return torch.matmul(inp, quantizer.dequantize(weight, scale=kept).to(inp.dtype))
