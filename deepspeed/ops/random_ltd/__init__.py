# SPDX-License-Identifier: Apache-2.0
"""Random layer-wise token dropping: drawing tokens, taking them out and putting them back."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".dropping_utils": [
            "*",
            "GatherTokens",
            "ScatterTokens",
            "bert_sample_tokens",
            "gpt_sample_tokens",
        ]
    },
)
