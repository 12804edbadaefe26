# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled on this machine: by NVRTC, once, into a folder where files are named by what they were made of.

Many processes may compile the same kernel at once. Each writes a file of its own and renames it into place, so a
reader sees a whole file or none, and whoever comes last replaces equal bytes by equal bytes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from deepspeed.ops.cuda_nvrtc import Nvrtc, NvrtcError, find
from deepspeed.ops.cuda_pack import hash_of_sources
from deepspeed.utils import env
from deepspeed.utils.logging import logger

_DIGEST = 32  # bytes of SHA-256 before each file's content


def folder() -> Path:
    """Return where compiled kernels are kept: DS_KERNEL_CACHE, else the user's cache folder."""
    chosen = env.DS_KERNEL_CACHE.get()
    if chosen:
        return Path(chosen)
    below = ("AppData", "Local") if sys.platform == "win32" else (".cache",)
    return Path.home().joinpath(*below, "deepspeed", "kernels")


class KernelCompiler:
    """Compiles units from source for one GPU generation, through the cache.

    Args:
        sources: every kernel source and header by file name.
        nvrtc: finds the compiler; asked at the first use only.
    """

    def __init__(self, sources: dict[str, str], nvrtc: Callable[[], Nvrtc] | None = None) -> None:
        self._sources = sources
        self._hash = hash_of_sources(sources)
        self._find = nvrtc or (lambda: find(Path(torch.__file__).parent))
        self._nvrtc: Nvrtc | None = None

    def image(self, unit: str, capability: tuple[int, int]) -> tuple[bytes, str]:
        """Return a compiled unit and a few words on where it came from.

        Raises:
            NvrtcError: there is no NVRTC, or it does not compile for that GPU.
        """
        if self._nvrtc is None:
            self._nvrtc = self._find()
        nvrtc = self._nvrtc
        arch = _best_arch(nvrtc, capability)
        made_of = f"{self._hash} {unit} {arch} nvrtc {nvrtc.version}"
        path = folder() / f"{unit}.{arch}.{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
        told = f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} for {arch}"
        found = _read(path)
        if found is not None:
            return found, f"{told}, from {path}"
        headers = {name: text for name, text in self._sources.items() if name.endswith(".cuh")}
        made = nvrtc.compile(f"{unit}.cu", self._sources[f"{unit}.cu"], headers, arch)
        _publish(path, made)
        return made, told


def _best_arch(nvrtc: Nvrtc, capability: tuple[int, int]) -> str:
    number = capability[0] * 10 + capability[1]
    known = nvrtc.architectures()
    if number in known:
        return f"sm_{number}"
    older = [other for other in known if other < number]
    if not older:
        raise NvrtcError(
            f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} no longer compiles for sm_{number}"
        )
    return f"compute_{max(older)}"


def _read(path: Path) -> bytes | None:
    """Return the content of a cache file, or None where it is missing or not what was written."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content = whole[_DIGEST:]
    return content if content and hashlib.sha256(content).digest() == whole[:_DIGEST] else None


def _publish(path: Path, content: bytes) -> None:
    """Put a file into the cache, whole or not at all. A cache that cannot be written costs time only."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except OSError as error:
        logger.info("compiled CUDA kernels are not kept: %s", error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
