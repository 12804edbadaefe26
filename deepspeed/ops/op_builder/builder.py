# SPDX-License-Identifier: Apache-2.0
"""`OpBuilder`: the legacy way to a native op, and the way to compile a user's own C++ op.

Our ops come compiled, so `load` of the builders here compiles nothing. A subclass that names `sources` is
compiled by torch's extension loader when it is first loaded.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger


class MissingCUDAException(Exception):
    """An op needs the CUDA toolkit, and none is installed."""


class CUDAMismatchException(Exception):
    """The CUDA toolkit is of another version than the one torch was built with."""


def installed_cuda_version(name: str = "") -> tuple[int, int]:
    """Return the version of the CUDA toolkit's compiler as (major, minor).

    Raises:
        MissingCUDAException: no toolkit is installed.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        raise MissingCUDAException(f"{name or 'the op'} needs the CUDA toolkit; CUDA_HOME is unset")
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc"
    words = subprocess.run([str(nvcc), "-V"], capture_output=True, text=True, check=True).stdout
    release = words.split("release ")[1].split(",")[0]
    major, minor = release.split(".")[:2]
    return int(major), int(minor)


class OpBuilder:
    """Loads one op by its legacy name.

    Class attributes of a subclass say what it is; the builders of this package get theirs from a table.
    """

    NAME: ClassVar[str] = ""
    BUILD_VAR: ClassVar[str] = ""
    ABSOLUTE_NAME: ClassVar[str] = ""
    # makes the namespace of functions, for ops that need no compilation
    NAMESPACE: ClassVar[Callable[[], Any] | None] = None
    # why the op cannot be had, "" if it can
    MISSING: ClassVar[str] = ""

    _loaded_ops: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME
        self.error_log: str | None = None

    def absolute_name(self) -> str:
        """Return the import path that upstream gives the compiled module."""
        return self.ABSOLUTE_NAME or f"deepspeed.ops.{self.name}_op"

    def sources(self) -> list[str]:
        """Return the C++ (or CUDA) files of the op; empty for ops that come compiled."""
        return []

    def include_paths(self) -> list[str]:
        """Return further header folders."""
        return []

    def cxx_args(self) -> list[str]:
        """Return flags of the C++ compiler."""
        return []

    def nvcc_args(self) -> list[str]:
        """Return flags of nvcc."""
        return []

    def extra_ldflags(self) -> list[str]:
        """Return flags of the linker."""
        return []

    def libraries_args(self) -> list[str]:
        """Return libraries to link."""
        return []

    def is_compatible(self, verbose: bool = False) -> bool:
        """Say whether `load` can succeed here; the reason why not is kept in `error_log`."""
        self.error_log = self._obstacle()
        if self.error_log and verbose:
            self.warning(self.error_log)
        return self.error_log is None

    def load(self, verbose: bool = True) -> Any:
        """Return the op's functions as a module or namespace.

        Raises:
            RuntimeError: the op is not built yet, or its sources cannot be compiled here.
        """
        key = self.absolute_name()
        if key not in self._loaded_ops:
            make = type(self).NAMESPACE
            self._loaded_ops[key] = self.jit_load(verbose) if make is None else make()
        return self._loaded_ops[key]

    def jit_load(self, verbose: bool = True) -> Any:
        """Compile the sources with torch's extension loader; returns the module.

        Raises:
            RuntimeError: there is nothing to compile, or no way to.
        """
        if not self.is_compatible(verbose):
            raise RuntimeError(
                explain(f"the op {self.name} cannot be loaded", got=str(self.error_log))
            )
        from torch.utils import cpp_extension

        return cpp_extension.load(
            name=self.name,
            sources=[self.deepspeed_src_path(source) for source in self.sources()],
            extra_include_paths=self.strip_empty_entries(self.include_paths()),
            extra_cflags=self.strip_empty_entries(self.cxx_args()),
            extra_cuda_cflags=self.strip_empty_entries(self.nvcc_args()),
            extra_ldflags=self.strip_empty_entries(self.extra_ldflags()),
            verbose=verbose,
        )

    def builder(self) -> Any:
        """Return a setuptools extension of the sources."""
        from torch.utils.cpp_extension import CppExtension

        return CppExtension(
            name=self.absolute_name(),
            sources=self.strip_empty_entries(self.sources()),
            include_dirs=self.strip_empty_entries(self.include_paths()),
            libraries=self.strip_empty_entries(self.libraries_args()),
            extra_compile_args={"cxx": self.strip_empty_entries(self.cxx_args())},
            extra_link_args=self.strip_empty_entries(self.extra_ldflags()),
        )

    def is_cuda_enable(self) -> bool:
        """Say whether torch was built with CUDA."""
        return torch.version.cuda is not None

    @staticmethod
    def is_rocm_pytorch() -> bool:
        """Say whether torch was built with ROCm."""
        return torch.version.hip is not None

    @staticmethod
    def is_sycl_enabled() -> bool:
        """Say whether a SYCL compiler is in reach."""
        return shutil.which("icpx") is not None

    def command_exists(self, cmd: str | list[str]) -> bool:
        """Say whether the command, or one of several, is installed."""
        names = [cmd] if isinstance(cmd, str) else cmd
        return any(shutil.which(name) is not None for name in names)

    def deepspeed_src_path(self, code_path: str) -> str:
        """Return an absolute path as it is, another one below the package's folder."""
        package = Path(__file__).resolve().parents[2]
        return code_path if Path(code_path).is_absolute() else str(package / code_path)

    def strip_empty_entries(self, args: list[str]) -> list[str]:
        """Return the list without its empty texts."""
        return [arg for arg in args if arg]

    def warning(self, msg: str) -> None:
        """Log a warning under the op's name."""
        logger.warning("%s: %s", self.name, msg)

    def _obstacle(self) -> str | None:
        if self.MISSING:
            return self.MISSING
        if type(self).NAMESPACE is not None:
            return None
        if not self.sources():
            return "it names no sources to compile"
        if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
            return "ninja, which torch needs to compile it, is not installed"
        return None


class CUDAOpBuilder(OpBuilder):
    """Legacy base of the ops that have CUDA sources."""


class TorchCPUOpBuilder(CUDAOpBuilder):
    """Legacy base of the CPU ops."""
