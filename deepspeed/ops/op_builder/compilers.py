# SPDX-License-Identifier: Apache-2.0
"""Which C++ compilers this machine has, and what they build for; imports the standard library only.

Both builds use it: the one of our own library (op_builder/build.py, which loads this file by its path, because no
torch is in reach then) and the one of a user's op (source.py).
"""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from typing import NamedTuple

# system -> file name of our library
LIBRARY_NAMES = {"windows": "ds_cpu.dll", "darwin": "libds_cpu.dylib", "linux": "libds_cpu.so"}
# The glibc that the library asks for is this one or an older one: that of CentOS 7, and of every Linux since.
GLIBC_FLOOR = (2, 17)


class Target(NamedTuple):
    """What to build for.

    Attributes:
        tag: the wheel's platform tag, with "-" and "." as "_".
        system: "windows", "darwin" or "linux".
        machine: "x86_64", "arm64" or "other".
    """

    tag: str
    system: str
    machine: str

    @property
    def library(self) -> str:
        """File name of the shared library."""
        return LIBRARY_NAMES[self.system]

    @property
    def zig(self) -> str:
        """The target as zig names it; an old glibc, so that the library runs on old systems."""
        machine = {"arm64": "aarch64"}.get(self.machine, self.machine)
        glibc = ".".join(map(str, GLIBC_FLOOR))
        return {"windows": f"{machine}-windows-gnu", "darwin": f"{machine}-macos"}.get(
            self.system, f"{machine}-linux-gnu.{glibc}"
        )


class Compiler(NamedTuple):
    """A C++ compiler: the words that start it, and the family of its flags ("gnu", "zig" or "msvc")."""

    words: tuple[str, ...]
    family: str

    @property
    def name(self) -> str:
        """The words, for messages and records."""
        return " ".join(self.words)


def native_target() -> Target:
    """Return the target of the running Python."""
    return target_of(sysconfig.get_platform())


def target_of(tag: str) -> Target:
    """Return the target of a platform tag such as "win_amd64" or "linux_x86_64"."""
    tag = tag.replace("-", "_").replace(".", "_")
    system = "windows" if tag.startswith("win") else "darwin" if tag.startswith("mac") else "linux"
    ending = platform.machine().lower() if tag.endswith("universal2") else tag
    if ending.endswith(("amd64", "x86_64")):
        machine = "x86_64"
    elif ending.endswith(("arm64", "aarch64")):
        machine = "arm64"
    else:
        machine = "other"
    return Target(tag, system, machine)


def find_compilers(target: Target, named: str | None = None) -> list[Compiler]:
    """Return the compilers of this machine that can build for the target, best first.

    Args:
        target: what to build for.
        named: the words of a compiler that the user chose (CXX), which then is the first.
    """
    found = [_of_words(tuple(named.split()))] if named else []
    if target.tag == native_target().tag:
        if target.system == "windows":
            found += [Compiler((name,), "msvc") for name in ("cl", "clang-cl") if _there(name)]
        names = ("g++", "clang++") if target.system == "linux" else ("clang++", "g++")
        found += [Compiler((name,), "gnu") for name in names if _there(name)]
    elif target.system == "windows" and target.machine == "x86_64":
        # std::thread needs the flavour with POSIX threads.
        cross = "x86_64-w64-mingw32-g++-posix"
        found += [Compiler((cross,), "gnu")] if _there(cross) else []
    if find_spec("ziglang") is not None and target.machine != "other":
        found.append(Compiler((sys.executable, "-m", "ziglang", "c++"), "zig"))
    return found


def _there(name: str) -> bool:
    return shutil.which(name) is not None


def _of_words(words: tuple[str, ...]) -> Compiler:
    last = words[-1].replace("\\", "/").rpartition("/")[2].lower().removesuffix(".exe")
    if last in ("cl", "clang-cl"):
        return Compiler(words, "msvc")
    return Compiler(words, "zig" if "ziglang" in words or "zig" in words[0] else "gnu")
