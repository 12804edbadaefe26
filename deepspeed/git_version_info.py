# SPDX-License-Identifier: Apache-2.0
"""Which DeepSpeed this is."""

from __future__ import annotations

import importlib
from typing import Any

version = "0.20.0"
git_hash = "[none]"
git_branch = "[none]"


def __getattr__(name: str) -> Any:
    """Tables of the ops under their legacy names, made when they are asked for."""
    if name in ("installed_ops", "compatible_ops"):
        return importlib.import_module("deepspeed.ops").__compatible_ops__
    if name == "accelerator_name":
        return importlib.import_module("deepspeed.ops.op_builder.all_ops").accelerator_name
    if name == "torch_info":
        build = importlib.import_module("torch").version
        short = [".".join((text or "0.0").split(".")[:2]) for text in (build.cuda, build.hip)]
        return {
            "version": ".".join(build.__version__.split(".")[:2]),
            "bf16_support": True,
            "cuda_version": short[0],
            "nccl_version": "0.0",
            "hip_version": short[1],
        }
    raise AttributeError(f"module {__name__} has no attribute {name}")
