# SPDX-License-Identifier: Apache-2.0
"""Quantisation and pruning during training."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".compress": ["init_compression", "redundancy_clean"],
        ".helper": ["convert_conv1d_to_linear"],
        ".scheduler": ["compression_scheduler"],
    },
)
