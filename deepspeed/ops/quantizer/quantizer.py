# SPDX-License-Identifier: Apache-2.0
"""`ds_quantizer`: one tensor, in place, to what whole numbers of few bits can hold."""

from __future__ import annotations

from torch import Tensor

from deepspeed.ops.cuda_quant import fake_quantize


def ds_quantizer(
    input: Tensor, groups: int = 1, bit_num: int = 8, sr: bool = False, asym: bool = False
) -> Tensor:
    """Round a tensor in place to `bit_num` bits, group by group; returns it.

    Args:
        input: fp32, bf16 or fp16.
        groups: of as many consecutive values each.
        bit_num: 1 to 16.
        sr: round up with the probability of the fraction; seeded by torch's generator.
        asym: with an offset.

    Raises:
        ValueError: the values do not divide into the groups, or there are no such bits.
    """
    return fake_quantize(input, groups, bit_num, asym, sr)
