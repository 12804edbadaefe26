# SPDX-License-Identifier: Apache-2.0
"""The start of the pass `autotp` on an engine."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from packaging.version import Version

from deepspeed.utils.errors import explain
from deepspeed.utils.torch import required_torch_version

from .passes.tp_compile import defer_collectives_to_compiler

AUTOTP_MIN_TORCH_VERSION = 2.6
# Releases whose batched experts write into the routing tensor (huggingface/transformers#45634 mends it).
BROKEN_TRANSFORMERS_MOE_VERSIONS = ("5.8.0", "5.10.1")


def start_autotp(engine: Any) -> None:
    """Make the collectives of an engine's divided layers nodes of its graphs.

    Raises:
        NotImplementedError: together with a ZeRO pass, or for a layer that cannot.
        RuntimeError: for torch or transformers that it does not work with.
    """
    others = [each for each in engine._config.compile_config.passes if each != "autotp"]
    if others:
        raise NotImplementedError(
            explain(
                "the compile pass autotp cannot yet be combined with others",
                got=f"compile.passes: {engine._config.compile_config.passes}",
                fix="leave 'autotp' alone in compile.passes; ZeRO works by its hooks then",
            )
        )
    if not required_torch_version(min_version=AUTOTP_MIN_TORCH_VERSION):
        raise RuntimeError(
            explain(
                "the compile pass autotp needs a newer torch",
                got=str(torch.__version__),
                expected=f">= {AUTOTP_MIN_TORCH_VERSION}",
            )
        )
    _check_broken_transformers_moe(engine.module)
    defer_collectives_to_compiler(engine.module)


def _check_broken_transformers_moe(model: torch.nn.Module) -> None:
    """Refuse experts that certain releases of transformers compute wrongly in one graph."""
    if "transformers" not in sys.modules:
        return
    found = Version(importlib.import_module("transformers").__version__)
    first, fixed = (Version(each) for each in BROKEN_TRANSFORMERS_MOE_VERSIONS)
    if not first <= found < fixed or not any(_is_batched(each) for each in model.modules()):
        return
    raise RuntimeError(
        explain(
            "batched_mm experts of this transformers write into the routing tensor "
            "(huggingface/transformers#45634)",
            got=f"transformers {found}",
            expected=f"below {first}, or {fixed} and newer",
            fix="use another experts implementation, or another transformers",
        )
    )


def _is_batched(module: Any) -> bool:
    marked = hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated")
    config = getattr(module, "config", None)
    return marked and getattr(config, "_experts_implementation", None) == "batched_mm"
