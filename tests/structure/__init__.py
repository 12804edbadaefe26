# SPDX-License-Identifier: Apache-2.0
"""Tests that read the source as text and trees: layers, caps, budgets, words."""
