# SPDX-License-Identifier: Apache-2.0
"""The plug-in interface by which an engine's files are written and read one by one."""

from __future__ import annotations

from ...utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".checkpoint_engine": ["CheckpointCommitInfo", "CheckpointEngine"],
        ".decoupled_checkpoint_engine": ["DecoupledCheckpointEngine"],
        ".fast_checkpoint_engine": ["FastCheckpointEngine"],
        ".torch_checkpoint_engine": ["TorchCheckpointEngine"],
        ".utils": ["create_checkpoint_engine"],
    },
)
