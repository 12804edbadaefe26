# SPDX-License-Identifier: Apache-2.0
"""Recomputing activations instead of keeping them."""
