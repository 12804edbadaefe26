# SPDX-License-Identifier: Apache-2.0
"""Training on sequences that are split over ranks (Arctic Long Sequence Training, arXiv:2506.13996)."""
