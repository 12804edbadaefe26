# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: layers in stages on different ranks."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".engine": ["*", "PipelineEngine"],
        ".module": ["*", "PipelineModule", "LayerSpec", "TiedLayerSpec", "PipelineError"],
        ".p2p": ["*"],
        ".schedule": ["*"],
        ".topology": [
            "*",
            "PipeDataParallelTopology",
            "PipelineParallelGrid",
            "PipeModelDataParallelTopology",
            "ProcessTopology",
        ],
    },
)
