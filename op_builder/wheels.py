# SPDX-License-Identifier: Apache-2.0
"""Builds the wheels of Linux and Windows on one machine, and refuses one that not every system of its kind can use.

``python -m op_builder.wheels`` leaves both in dist/; ``--targets win_amd64,manylinux_2_17_aarch64`` names others, and
``--targets native`` is this machine's, made with the compiler that is installed here. Python's standard library and
pip do: what the build needs (setuptools, NVRTC, and zig, which compiles for every system) is taken from PyPI into an
environment of its own, unless the running Python has it all. The kernels are compiled once and packed into each.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from op_builder import binaries, build, kernels

ROOT = build.ROOT
TARGETS = (f"manylinux_{'_'.join(map(str, build.GLIBC_FLOOR))}_x86_64", "win_amd64")
NATIVE = "native"
MOST_BYTES = 15 << 20
# NVRTC is one release: another one makes other kernels of the same sources.
NVRTC = "nvidia-cuda-nvrtc-cu12==12.8.93"
TOOLS = ("setuptools>=77", "wheel>=0.38", "ziglang>=0.13", NVRTC)
PACKED = (
    "pyproject.toml setup.py README.md LICENSE MANIFEST.in build_win.bat deepspeed csrc op_builder"
)
_LIBRARY = "deepspeed/ops/lib/"


class WheelError(RuntimeError):
    """A wheel was not built, or is not fit to be given away; the message says why."""


class Contents(NamedTuple):
    """What was found in a wheel: sizes in bytes, the library's needs, and the hash of the kernel pack ("" without)."""

    wheel: Path
    size: int
    library: str
    library_size: int
    needs: binaries.Needs | None
    pack_size: int
    pack_hash: str
    images: int

    def __str__(self) -> str:
        """A paragraph for the build's log."""
        lines = [f"{self.wheel.name}: {self.size / 2**20:.2f} MiB"]
        needs = "" if self.needs is None else f", needs {', '.join(self.needs.libraries)}"
        if self.needs is not None and self.needs.glibc is not None:
            needs += f" (glibc {'.'.join(map(str, self.needs.glibc))} or newer)"
        lines.append(f"  {self.library}: {self.library_size / 2**20:.2f} MiB{needs}")
        pack = f"{self.images} compiled images, sha256 {self.pack_hash[:16]}"
        lines.append(f"  {kernels.PACK_NAME}: {self.pack_size / 2**20:.2f} MiB, {pack}")
        return "\n".join(lines)


def inspect(wheel: Path) -> Contents:
    """Open a wheel and check what it holds.

    Raises:
        WheelError: it is no wheel for every Python of one platform, is too large, or lacks a part.
        binaries.BinaryError: the library needs what not every system has.
    """
    if "-py3-none-" not in wheel.name or wheel.name.endswith("-any.whl"):
        raise WheelError(f"{wheel.name}: expected py3-none-<platform>, with the native library")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        raise WheelError(f"{wheel.name} has {size} bytes, at most {MOST_BYTES} are allowed")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        there = {name.removeprefix(_LIBRARY): name for name in archive.namelist()}
        found = [name for name in build.LIBRARIES if name in there]
        if len(found) != 1 or kernels.PACK_NAME not in there:
            raise WheelError(f"{wheel.name}: expected one library and {kernels.PACK_NAME}")
        library = Path(archive.extract(there[found[0]], folder))
        needs = None
        if library.suffix != ".dylib":
            # what was built for this machine alone may ask for the C library that it has
            promised = build.GLIBC_FLOOR if "manylinux" in wheel.name else (3,)
            needs = binaries.check(library, promised)
        pack = Path(archive.extract(there[kernels.PACK_NAME], folder))
        images = [name for name in zipfile.ZipFile(pack).namelist() if name.endswith("cubin")]
        return Contents(
            wheel,
            size,
            library.name,
            library.stat().st_size,
            needs,
            pack.stat().st_size,
            hashlib.sha256(pack.read_bytes()).hexdigest(),
            len(images),
        )


def build_wheels(out: Path, targets: tuple[str, ...] = TARGETS) -> list[Contents]:
    """Build one wheel for each platform tag into a folder; returns what each holds.

    Raises:
        WheelError: a tool cannot be had, a build fails, or the kernels of two wheels differ.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deepspeed wheels ") as name:
        folder = Path(name)
        python = _tools(folder / "tools")
        source = _copy_of_the_tree(folder / "source")
        lib = str(source / _LIBRARY)
        _run([python, "-m", "op_builder.kernels", "--out", lib], source)
        made = [inspect(_wheel(python, source, out, target)) for target in targets]
    if len({contents.pack_hash for contents in made}) != 1:
        raise WheelError("the wheels hold different kernels")
    if not all(contents.images for contents in made):
        raise WheelError("the wheels hold the sources of the kernels only")
    return made


def _tools(folder: Path) -> str:
    """Return a Python that has all of TOOLS: this one, or one in a new environment."""
    if all(_is_installed(tool) for tool in TOOLS):
        return sys.executable
    print(f"installing {', '.join(TOOLS)} for the build", flush=True)
    venv.create(folder, with_pip=True)
    windows = sys.platform == "win32"
    python = str(
        folder / ("Scripts" if windows else "bin") / ("python.exe" if windows else "python")
    )
    quiet = ["-q", "--disable-pip-version-check"]
    _run([python, "-m", "pip", "install", *quiet, *TOOLS], folder)
    return python


def _is_installed(requirement: str) -> bool:
    name, relation, version = re.split("(>=|==)", requirement)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    if relation == "==":
        return found == version
    there, wanted = re.findall(r"\d+", found), version.split(".")
    return [int(part) for part in there[: len(wanted)]] >= [int(part) for part in wanted]


def _copy_of_the_tree(folder: Path) -> Path:
    """Copy what a wheel is made of: a build leaves files beside its sources."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", *build.LIBRARIES, "build.json")
    for name in PACKED.split():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def _wheel(python: str, source: Path, out: Path, target: str) -> Path:
    shutil.rmtree(source / "build", ignore_errors=True)
    aside = source / "wheels" / target
    words = ["wheel", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    if target != NATIVE:
        words.append(f"--config-settings=--build-option=--plat-name={target}")
    _run([python, "-m", "pip", *words, "-w", str(aside), str(source)], source)
    (made,) = aside.glob("deepspeed-*.whl")
    final = out / made.name
    shutil.copyfile(made, final)
    return final


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise WheelError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"[-6000:])


def main(argv: list[str] | None = None) -> int:
    """Build from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m op_builder.wheels", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels")
    parser.add_argument("--targets", default=",".join(TARGETS), help="platform tags, or native")
    args = parser.parse_args(argv)
    try:
        made = build_wheels(args.out.resolve(), tuple(args.targets.split(",")))
    except (WheelError, binaries.BinaryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for contents in made:
        print(contents)
    if len(made) > 1:
        print("the kernels are the same bytes in each wheel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
