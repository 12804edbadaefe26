# SPDX-License-Identifier: Apache-2.0
"""Tests by need: unit, dist, contract, structure, cuda, windows (CONTRIBUTING.md)."""
