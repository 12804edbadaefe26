# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 or 4 bits for inference."""
