# SPDX-License-Identifier: Apache-2.0
"""Models whose blocks run as a fused program, and models whose layers are divided over ranks."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".autotp_config": [
            "AutoTPConfig",
            "AutoTPPresets",
            "PartitionType",
            "TPLayerSpec",
            "merge_autotp_configs",
        ],
        ".layers": [
            "LinearAllreduce",
            "LinearLayer",
            "SubParamLinearAllreduce",
            "SubParamLinearLayer",
            "set_autotp_mode",
        ],
        ".policy": [
            "DSPolicy",
            "EmbeddingLayer",
            "GroupQuantizer",
            "HFBertLayerPolicy",
            "Normalize",
            "ReplaceWithTensorSlicing",
            "generic_injection",
            "quantize_transformer_layer",
        ],
        ".replace_module": ["replace_transformer_layer", "revert_transformer_layer"],
    },
)
