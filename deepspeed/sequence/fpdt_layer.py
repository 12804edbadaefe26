# SPDX-License-Identifier: Apache-2.0
"""The names of FPDT (attention over chunks of a sequence that wait in host memory), which this version does not have."""

from __future__ import annotations

from typing import Any, NoReturn

from deepspeed.utils.errors import explain

__all__ = [
    "FPDT_Attention",
    "FPDT_FFN",
    "FPDT_InputConstruct",
    "FPDT_LogitsLoss",
    "SequenceChunk",
]


class _NotBuilt:
    """Says so when it is used, not when it is imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.apply()

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            explain(
                f"{cls.__name__} is not available: FPDT is not part of this version",
                fix="split the sequence over ranks with deepspeed.sequence.layer.DistributedAttention, and tile layers "
                "and losses with TiledMLP and TiledFusedLogitsLoss of deepspeed.runtime.sequence_parallel.ulysses_sp",
            )
        )


class FPDT_InputConstruct(_NotBuilt):
    """Not built."""


class FPDT_Attention(_NotBuilt):
    """Not built."""


class FPDT_FFN(_NotBuilt):
    """Not built."""


class FPDT_LogitsLoss(_NotBuilt):
    """Not built."""


class SequenceChunk(_NotBuilt):
    """Not built."""


class _FPDTGPUOffloadingAttentionImpl_(_NotBuilt):
    """Not built."""
