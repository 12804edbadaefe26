# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: their format, how they are written so that none is lost, how they are read so that none can harm."""

from __future__ import annotations

from ..utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".reader": ["add_safe_classes"],
        ".utils": [
            "clone_tensors_for_torch_save",
            "get_layer_ckpt_name_for_rank",
            "get_model_ckpt_name_for_rank",
            "get_zero_ckpt_name_for_rank",
        ],
        ".deepspeed_checkpoint": ["DeepSpeedCheckpoint"],
        ".reshape_3d_utils": ["get_model_3d_descriptor", "model_3d_desc"],
        ".reshape_meg_2d": ["reshape_meg_2d_parallel"],
        ".reshape_utils": ["merge_state"],
        ".universal_checkpoint": ["SubparamShape", "enable_universal_checkpoint"],
        ".zero_checkpoint": ["ZeROCheckpoint"],
        ".constants": ["*"],
        ".format": ["*"],
        ".atomic": ["*"],
    },
)
