# SPDX-License-Identifier: Apache-2.0
"""The types by which callers recognise our optimizer wrappers."""

from __future__ import annotations


class DeepSpeedOptimizer:
    """Any optimizer that `deepspeed.initialize` returns instead of the user's own."""


class ZeROOptimizer(DeepSpeedOptimizer):
    """A DeepSpeedOptimizer that shards its states over the data-parallel ranks (ZeRO stages 1 to 3)."""
