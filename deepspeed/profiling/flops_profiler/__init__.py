# SPDX-License-Identifier: Apache-2.0
"""Operations, params and time of a model, by module."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".profiler": ["FlopsProfiler", "get_model_profile"],
        ".formatting": [
            "bytes_to_string",
            "duration_to_string",
            "flops_to_string",
            "macs_to_string",
            "number_to_string",
            "params_to_string",
        ],
    },
)
