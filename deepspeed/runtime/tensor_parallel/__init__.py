# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism in training."""
