# SPDX-License-Identifier: Apache-2.0
"""Models whose blocks run as a fused program."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".replace_module": ["replace_transformer_layer", "revert_transformer_layer"],
    },
)
