# SPDX-License-Identifier: Apache-2.0
"""`nhwc_bias_add`: the bias of a convolution, and what is added beside it, in one walk over memory."""

from __future__ import annotations

from torch import Tensor

from deepspeed.ops import cuda_tokens


def nhwc_bias_add(
    activation: Tensor,
    bias: Tensor,
    other: Tensor | None = None,
    other_bias: Tensor | None = None,
) -> Tensor:
    """Return ``activation + bias``, and if given ``+ other``, and if given ``+ other_bias``.

    Args:
        activation: `[batch, channels, height, width]`, fastest in channels-last fp16 on a GPU.
        bias: `[channels]`, of the activation's dtype.
        other: like `activation`.
        other_bias: like `bias`.
    """
    return cuda_tokens.bias_add(activation, bias, other, other_bias)
