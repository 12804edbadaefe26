# SPDX-License-Identifier: Apache-2.0
"""Packs of made-up images: real sources and index, and content that the fake driver takes or refuses."""

from __future__ import annotations

from op_builder import kernels


def index_of(texts, images, floor=12000, ptx_floor=12080):
    index = kernels._empty_index(kernels._nvrtc_module(), texts, None)
    index["compiler"] = "nvrtc 12.8"
    index["driver_floor"], index["ptx_driver_floor"] = floor, ptx_floor
    return kernels._fill(index, images)


def make(folder, images, change=None, **floors):
    """Write kernels.zip whose every unit has the given images (arch -> bytes); `change` may edit the index."""
    texts = kernels.sources()
    units = [name.removesuffix(".cu") for name in texts if name.endswith(".cu")]
    content = {(unit, arch): image for unit in units for arch, image in images.items()}
    index = index_of(texts, content, **floors)
    if change is not None:
        change(index)
    path = folder / kernels.PACK_NAME
    kernels._write(path, index, texts, content)
    return path
