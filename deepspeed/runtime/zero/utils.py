# SPDX-License-Identifier: Apache-2.0
"""Small questions about ZeRO that other libraries ask."""

from __future__ import annotations

from typing import Any

import torch

from .own_slice import is_zero_param

__all__ = ["ZeRORuntimeException", "is_zero_param", "is_zero_supported_optimizer"]


class ZeRORuntimeException(Exception):
    """A request that sharded training cannot serve."""


def is_zero_supported_optimizer(optimizer: Any) -> bool:
    """Whether ZeRO is known to serve this very type of optimizer (a subclass does not count)."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam, ZenFlowCPUAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.ops.sgd import DeepSpeedCPUSGD

    from .muon.muon_optimizer import MuonWithAuxAdam

    served = {
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adagrad,
        FusedAdam,
        DeepSpeedCPUAdam,
        ZenFlowCPUAdam,
        DeepSpeedCPUAdagrad,
        DeepSpeedCPULion,
        DeepSpeedCPUSGD,
        FusedLion,
        MuonWithAuxAdam,
    }
    return type(optimizer) in served
