# SPDX-License-Identifier: Apache-2.0
"""The machine under the tensors: one object that hides what differs between a CPU and a GPU."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".abstract_accelerator": ["DeepSpeedAccelerator"],
        ".real_accelerator": [
            "get_accelerator",
            "is_current_accelerator_supported",
            "set_accelerator",
        ],
    },
)
