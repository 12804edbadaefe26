# SPDX-License-Identifier: Apache-2.0
"""Asynchronous file I/O: `FileQueue` for this package, `AsyncIOBuilder` with `aio_handle` for users; looked up on use."""

from __future__ import annotations

import importlib

_HOMES = {
    "AsyncIOBuilder": "deepspeed.ops.op_builder",
    "GDSBuilder": "deepspeed.ops.op_builder",
    "FileQueue": "deepspeed.ops.aio.queue",
    "Options": "deepspeed.ops.aio.library",
    "aio_handle": "deepspeed.ops.aio.async_io_op",
    "backends": "deepspeed.ops.aio.library",
    "locked_tensor": "deepspeed.ops.aio.buffers",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(home), name)
