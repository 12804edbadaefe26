# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/cuda with NVRTC into kernels.zip: cubins for each GPU generation, PTX, sources and an index.

``python -m op_builder.kernels [--out DIR] [--archs sm_80,sm_90] [--sources-only]`` builds by hand; setup.py calls `build`.
NVRTC comes from PyPI (nvidia-cuda-nvrtc-cu12, 12.8 or newer; wheels are made with the one release that wheels.py
names), needs neither GPU, driver nor host compiler, and gives the same code on every system, so a Linux machine makes
the kernels of the Windows wheel too. The members are stored, not deflated, in one order with one date: equal sources
and compilers give equal bytes, whichever zlib is at hand; a wheel deflates the whole pack anyway.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda"
DEFAULT_OUT = ROOT / "deepspeed" / "ops" / "lib"
PACK_NAME = "kernels.zip"
FORMAT = 1

CUBINS = ("sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# For GPUs of later generations than any cubin; the oldest, so that it can also stand in for every one of them.
PTX = "compute_60"
ARCHS = (*CUBINS, PTX)
_DATE = (1980, 1, 1, 0, 0, 0)


class PackError(RuntimeError):
    """The pack could not be built; the message says why."""


def sources(folder: Path = SOURCE) -> dict[str, str]:
    """Return the text of every kernel source and header by file name, with plain line ends."""
    paths = sorted(p for p in folder.glob("*.cu*") if p.suffix in (".cu", ".cuh"))
    return {p.name: p.read_text(encoding="utf-8").replace("\r\n", "\n") for p in paths}


def source_hash(texts: dict[str, str]) -> str:
    """Return one hash of all sources: any change of any file changes it."""
    total = hashlib.sha256()
    for name, text in sorted(texts.items()):
        total.update(f"{name}\0{len(text)}\0{text}".encode())
    return total.hexdigest()


def build(
    out: Path = DEFAULT_OUT, archs: tuple[str, ...] = ARCHS, compile_now: bool = True
) -> Path:
    """Write kernels.zip into a folder, unless the one there was made from the same sources by the same compiler.

    Args:
        out: the folder.
        archs: what to compile for; ``sm_NN`` gives cubins, ``compute_NN`` PTX. What this NVRTC has dropped or does
            not know yet is left out.
        compile_now: False packs the sources alone, which are then compiled on the user's machine.

    Raises:
        PackError: there is no NVRTC, or a source does not compile.
    """
    texts = sources()
    tool = _nvrtc_module()
    compiler = None
    if compile_now:
        try:
            compiler = tool.find()
            archs = _served(compiler, archs)
        except tool.NvrtcError as error:
            raise PackError(str(error)) from error
    index = _empty_index(tool, texts, compiler)
    target = Path(out) / PACK_NAME
    if compiler is not None:
        if _is_current(target, index, archs):
            return target
        images = _compile(tool, compiler, texts, archs)
    else:
        images = {}
    _write(target, _fill(index, images), texts, images)
    return target


def build_for_wheel(out: Path) -> str:
    """Write the pack as well as this machine can; returns what it holds, as a sentence for the build's log.

    A pack that lies in the source tree and was made from these sources serves too: isolated builds have no NVRTC.
    """
    ready, target = DEFAULT_OUT / PACK_NAME, Path(out) / PACK_NAME
    if _is_current(ready, _empty_index(_nvrtc_module(), sources(), None), ARCHS):
        if ready.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ready, target)
        return f"took {PACK_NAME} from the source tree, {target.stat().st_size / 2**20:.1f} MiB"
    try:
        path = build(out)
    except PackError as error:
        path = build(out, compile_now=False)
        return f"packed the sources of the CUDA kernels only ({error})"
    return f"built {path.name}, {path.stat().st_size / 2**20:.1f} MiB"


def _served(compiler: Any, archs: tuple[str, ...]) -> tuple[str, ...]:
    known = {str(number) for number in compiler.architectures()}
    served = tuple(arch for arch in archs if arch.rpartition("_")[2] in known)
    for arch in sorted(set(archs) - set(served)):
        print(f"warning: {compiler.path.name} does not compile for {arch}", file=sys.stderr)
    if not served:
        raise PackError(f"{compiler.path} compiles for none of {', '.join(archs)}")
    return served


def _empty_index(tool: ModuleType, texts: dict[str, str], compiler: Any) -> dict[str, Any]:
    major, minor = compiler.version if compiler is not None else (0, 0)
    units = {
        name.removesuffix(".cu"): {"kernels": tool.entries(text), "images": {}}
        for name, text in texts.items()
        if name.endswith(".cu")
    }
    return {
        "format": FORMAT,
        "version": _version(),
        "source_hash": source_hash(texts),
        "compiler": f"nvrtc {major}.{minor}" if compiler is not None else None,
        # cuDriverGetVersion: cubins run on every driver of their CUDA generation, PTX from its own release on
        "driver_floor": major * 1000,
        "ptx_driver_floor": major * 1000 + minor * 10,
        "sources": sorted(texts),
        "units": units,
    }


def _compile(
    tool: ModuleType, compiler: Any, texts: dict[str, str], archs: tuple[str, ...]
) -> dict[tuple[str, str], bytes]:
    headers = {name: text for name, text in texts.items() if name.endswith(".cuh")}
    jobs = [(name, arch) for name in texts if name.endswith(".cu") for arch in archs]

    def one(job: tuple[str, str]) -> bytes:
        name, arch = job
        return compiler.compile(name, texts[name], headers, arch)

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            done = list(pool.map(one, jobs))
    except tool.NvrtcError as error:
        raise PackError(str(error)) from error
    return {
        (name.removesuffix(".cu"), arch): image
        for (name, arch), image in zip(jobs, done, strict=True)
    }


def _file_of(unit: str, arch: str) -> str:
    return f"{unit}.{arch}." + ("cubin" if arch.startswith("sm_") else "ptx")


def _fill(index: dict[str, Any], images: dict[tuple[str, str], bytes]) -> dict[str, Any]:
    for (unit, arch), image in images.items():
        index["units"][unit]["images"][arch] = {
            "file": _file_of(unit, arch),
            "sha256": hashlib.sha256(image).hexdigest(),
            "size": len(image),
        }
    return index


def _write(
    target: Path,
    index: dict[str, Any],
    texts: dict[str, str],
    images: dict[tuple[str, str], bytes],
) -> None:
    members = {"index.json": json.dumps(index, indent=1, sort_keys=True).encode()}
    members |= {f"src/{name}": text.encode() for name, text in texts.items()}
    members |= {_file_of(unit, arch): image for (unit, arch), image in images.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".zip")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as pack:
            for name, content in sorted(members.items()):
                info = zipfile.ZipInfo(name, _DATE)
                info.create_system = 3  # else the zip tells which system wrote it
                info.external_attr = 0o644 << 16
                pack.writestr(info, content, zipfile.ZIP_STORED)
        os.chmod(temporary, 0o644)  # mkstemp keeps others out, and a wheel keeps the mode
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _is_current(target: Path, index: dict[str, Any], archs: tuple[str, ...]) -> bool:
    try:
        with zipfile.ZipFile(target) as pack:
            there = json.loads(pack.read("index.json"))
            whole = pack.testzip() is None
        # without a compiler in reach, any one's work will do
        keys = ["format", "version", "source_hash"] + ["compiler"] * bool(index["compiler"])
        same = all(there[key] == index[key] for key in keys)
        complete = all(set(unit["images"]) == set(archs) for unit in there["units"].values())
        return whole and same and complete and set(there["units"]) == set(index["units"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return False


def _version() -> str:
    """Return the package's version, which a pack must share with the Python files that launch it."""
    text = (ROOT / "deepspeed" / "git_version_info.py").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise PackError("deepspeed/git_version_info.py names no version")
    return found[1]


def _nvrtc_module() -> ModuleType:
    """Load the package's compiler interface by its path: importing deepspeed would want torch."""
    path = ROOT / "deepspeed" / "ops" / "cuda_nvrtc.py"
    spec = importlib.util.spec_from_file_location("_ds_cuda_nvrtc", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Build from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of kernels.zip")
    parser.add_argument("--archs", default=",".join(ARCHS), help="comma-separated")
    parser.add_argument("--sources-only", action="store_true", help="pack without compiling")
    given = parser.parse_args()
    try:
        path = build(given.out, tuple(given.archs.split(",")), not given.sources_only)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
