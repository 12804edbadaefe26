# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.zero`: what callers use of ZeRO."""

from __future__ import annotations

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".partition_parameters": [
            "DeepSpeedTensorOverride",
            "GatheredParameters",
            "Init",
            "ZeroParamStatus",
            "ZeroParamType",
            "is_zero_param",
            "register_external_parameter",
        ],
        ".mics": ["MiCS_Init"],
        ".tiling": ["TiledLinear", "TiledLinearReturnBias"],
        ".config": ["DeepSpeedZeroConfig", "ZeroStageEnum"],
        ".parameter_offload": ["DeepSpeedZeRoOffload", "unwrap_model_for_generation"],
        ".utils": ["ZeRORuntimeException"],
    },
)
