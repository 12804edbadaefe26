# SPDX-License-Identifier: Apache-2.0
"""Attention over sequences that are split over ranks (DeepSpeed-Ulysses, arXiv:2309.14509)."""
