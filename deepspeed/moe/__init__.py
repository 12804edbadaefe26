# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: tokens choose the experts that compute them."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": ["*"],
        ".experts": ["*"],
        ".gating": ["*"],
        ".layer": ["*"],
        ".mappings": ["*"],
        ".sharded_moe": ["*"],
        ".utils": ["*"],
    },
)
