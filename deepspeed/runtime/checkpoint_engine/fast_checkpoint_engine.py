# SPDX-License-Identifier: Apache-2.0
"""Where programs look for the engine of the section ``checkpoint.writer``."""

from __future__ import annotations

from .torch_checkpoint_engine import FastCheckpointEngine

__all__ = ["FastCheckpointEngine"]
