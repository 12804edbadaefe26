# SPDX-License-Identifier: Apache-2.0
"""How each op of the table of builders would run on this machine: prebuilt, source, reference or none, and why."""

from __future__ import annotations

from typing import Any

from deepspeed.ops import aio, cuda, cuda_namespaces, native
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.ops.op_builder.builder import OpBuilder

# what the two loaders call their ways -> the word of the report
_WORDS = {"native": "prebuilt", "cubin": "prebuilt", "ptx": "prebuilt", "nvrtc": "source"}
# ops that are made of torch's operations on every device
_BY_TORCH = frozenset({"utils", "evoformer_attn"})
# ops with CUDA kernels that the native library has too
_ON_CPU = frozenset({"quantizer", "fp_quantizer"})


def routes() -> list[dict[str, Any]]:
    """Return a row for each op: name, installed, compatible, route, reason. Never raises."""
    ours, kernels = native.status(), cuda.summary()
    found = []
    for name, builder in ALL_OPS.items():
        route, reason = "none", ""
        if not builder.is_compatible(verbose=False):
            reason = str(builder.error_log)
        elif builder.sources():
            route, reason = "source", "compiled at its first use, kept after that"
        elif _is_for_cuda(builder) and not (kernels["route"] == "reference" and name in _ON_CPU):
            route, reason = _WORDS.get(kernels["route"], kernels["route"]), kernels["reason"]
        elif name in _BY_TORCH:
            route, reason = "reference", "torch has all of it"
        else:
            route, reason = _WORDS.get(ours.route, ours.route), ours.reason
            if route == "prebuilt" and name in ("async_io", "pin_memory"):
                part = "page locks" if name == "pin_memory" else aio.backends()[0]
                reason = f"{part} of {native.library_path().name}"
        installed, works = route == "prebuilt", route not in ("none", "broken")
        row = {"name": name, "installed": installed, "compatible": works}
        found.append({**row, "route": route, "reason": reason})
    return found


def _is_for_cuda(builder: OpBuilder) -> bool:
    make = type(builder).NAMESPACE
    return make is not None and make.__module__ == cuda_namespaces.__name__
