# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU library into the wheel, with no torch in reach; the rest is in pyproject.toml.

Without a C++ compiler the package works on torch alone, and keeps the reason for ds_report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
# A PEP 517 build does not put the project's own folder on the path.
sys.path.insert(0, str(ROOT))

from op_builder import build as native  # noqa: E402
from op_builder import kernels  # noqa: E402


class BuildWithLibrary(build_py):
    """Copies the Python files, then compiles csrc/ beside them."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, "editable_mode", False)
        base = ROOT if editable else Path(self.build_lib)
        folder = (base / "deepspeed" / "ops" / "lib").resolve()
        for name in native.LIBRARIES:
            # The source tree may hold a library of another platform or version.
            (folder / name).unlink(missing_ok=True)
        wanted = getattr(self.distribution.get_command_obj("bdist_wheel"), "plat_name", None)
        target = native.target_of(wanted) if wanted else native.native_target()
        try:
            library = native.build(folder, target)
        except native.BuildError as error:
            print(f"warning: the package will work on torch alone: {error}", file=sys.stderr)
        else:
            print(f"built {library.name}")
        print(kernels.build_for_wheel(folder))


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: the library knows nothing of Python's ABI."""

    def run(self) -> None:
        self.run_command("build")
        folder = Path(self.get_finalized_command("build_py").build_lib) / "deepspeed/ops/lib"
        self.root_is_pure = not any((folder / name).exists() for name in native.LIBRARIES)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


class NativeDistribution(Distribution):
    """A platform's package wherever there is a compiler to make it one."""

    def has_ext_modules(self) -> bool:
        return bool(native.find_compilers(native.native_target()))


COMMANDS = {"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}
setup(distclass=NativeDistribution, cmdclass=COMMANDS)
