# SPDX-License-Identifier: Apache-2.0
"""Layers and single operations of transformers."""

from .transformer import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

__all__ = ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer"]
