# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum of matrices, made orthogonal before it is applied (Jordan et al. 2024)."""
