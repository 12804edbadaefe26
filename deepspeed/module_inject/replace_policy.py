# SPDX-License-Identifier: Apache-2.0
"""Policies of known blocks."""

from __future__ import annotations

from .policy import HFBertLayerPolicy

__all__ = ["HFBertLayerPolicy", "generic_policies", "replace_policies"]

replace_policies: list[type] = [HFBertLayerPolicy]
generic_policies: list[type] = []
