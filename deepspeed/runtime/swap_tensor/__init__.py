# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk."""

from __future__ import annotations

# What callers take as the least that is worth a file of its own; tensors of any size may live in files here.
MIN_SWAPPABLE_BYTES = 1024 * 1024
