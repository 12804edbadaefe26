# SPDX-License-Identifier: Apache-2.0
"""The reductions of the public collectives, independent of torch's enum."""

from __future__ import annotations

from enum import Enum


class ReduceOp(Enum):
    """What a reduction does with the ranks' values."""

    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3
    BAND = 4
    BOR = 5
    BXOR = 6
    AVG = 7
    UNUSED = 8
