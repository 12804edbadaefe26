# SPDX-License-Identifier: Apache-2.0
"""Attention whose scores exist in some blocks only, on torch's operations."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".bert_sparse_self_attention": ["BertSparseSelfAttention"],
        ".matmul": ["MatMul"],
        ".softmax": ["Softmax"],
        ".sparse_attention_utils": ["SparseAttentionUtils"],
        ".sparse_self_attention": ["SparseSelfAttention"],
        ".sparsity_config": [
            "BSLongformerSparsityConfig",
            "BigBirdSparsityConfig",
            "DenseSparsityConfig",
            "FixedSparsityConfig",
            "LocalSlidingWindowSparsityConfig",
            "SparsityConfig",
            "VariableSparsityConfig",
        ],
    },
)
