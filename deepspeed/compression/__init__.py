# SPDX-License-Identifier: Apache-2.0
"""Quantisation and pruning during training."""
