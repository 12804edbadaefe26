# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel transformers whose sums over the ranks run beside the other half of the batch."""
