# SPDX-License-Identifier: Apache-2.0
"""`OpBuilder`: the legacy way to a native op, and the way to compile a user's own C++ op.

Our ops come compiled, so `load` of the builders here compiles nothing. A subclass that names `sources` is
compiled when it is first loaded, and found again by its content after that (source.py).
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from deepspeed.ops.op_builder import source, toolchain
from deepspeed.utils import env
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

_PTX = "+PTX"


class MissingCUDAException(Exception):
    """An op needs the CUDA toolkit, and none is installed."""


class CUDAMismatchException(Exception):
    """The CUDA toolkit is of another version than the one torch was built with."""


def installed_cuda_version(name: str = "") -> tuple[int, int]:
    """Return the version of the CUDA toolkit's compiler as (major, minor).

    Raises:
        MissingCUDAException: no toolkit is installed, or one without a compiler.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = CUDA_HOME and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin"))
    if not nvcc:
        raise MissingCUDAException(
            explain(
                f"{name or 'it'}: unable to compile CUDA ops",
                got=f"CUDA_HOME {CUDA_HOME}",
                expected="the folder of a CUDA toolkit, with bin/nvcc in it",
            )
        )
    words = subprocess.run([nvcc, "-V"], capture_output=True, text=True, check=True).stdout
    release = words.split("release ")[1].split(",")[0]
    major, minor = release.split(".")[:2]
    return int(major), int(minor)


def probe_is_compatible(builder: Any) -> bool:
    """Say whether an op can be loaded here; a probe that fails is a no, and is logged."""
    try:
        return bool(builder.is_compatible())
    except Exception as error:
        logger.info("%s: whether it can be loaded is not known: %s", builder.name, error)
        return False


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
    # whether a source op is linked with torch; None: if it includes torch's headers
    LINKS_TORCH: ClassVar[bool | None] = None
    # whether even its C++ sources are compiled for CUDA, where torch has it
    WITH_CUDA: ClassVar[bool] = False

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
        """Compile the sources, unless that was done before; returns the module.

        Raises:
            RuntimeError: there is nothing to compile, no way to, or the compiler refuses it; its words are in the
                message.
        """
        if not self.is_compatible(verbose):
            raise RuntimeError(f"the op {self.name} cannot be loaded: {self.error_log}")
        start = time.perf_counter()
        module = source.load(self.source_op(), verbose)
        if verbose:
            print(f"Time to load {self.name} op: {time.perf_counter() - start} seconds")
        return module

    def source_op(self) -> source.SourceOp:
        """Return what the methods above say of the sources, as the compilation takes it."""
        strip = self.strip_empty_entries
        return source.SourceOp(
            name=self.name,
            sources=tuple(map(self.deepspeed_src_path, strip(self.sources()))),
            include_paths=tuple(map(self.deepspeed_src_path, strip(self.include_paths()))),
            flags=tuple(strip(self.cxx_args())),
            cuda_flags=tuple(strip(self.nvcc_args())),
            link_flags=tuple(strip(self.extra_ldflags())),
            libraries=tuple(strip(self.libraries_args())),
            torch=self.LINKS_TORCH,
            cuda=self.WITH_CUDA and torch.cuda.is_available(),
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
    def installed_rocm_version() -> tuple[int, int]:
        """Return major and minor number of the ROCm that torch was built for; (0, 0) for none."""
        import torch

        if not torch.version.hip:
            return 0, 0
        major, minor = torch.version.hip.split(".")[:2]
        return int(major), int(minor)

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

    def has_function(
        self,
        funcname: str,
        libraries: list[str],
        library_dirs: list[str] | None = None,
        verbose: bool = False,
    ) -> bool:
        """Say whether a C function can be linked from these libraries with the compiler that is here."""
        code = f'extern "C" char {funcname}();\nint main() {{ return {funcname}(); }}\n'
        try:
            compiler = toolchain.compiler_for(with_torch=False)
        except source.SourceOpError as error:
            self.warning(str(error)) if verbose else None
            return False
        msvc = compiler.family == "msvc"
        words = [f"{name}.lib" if msvc else f"-l{name}" for name in libraries]
        words += [f"/LIBPATH:{path}" if msvc else f"-L{path}" for path in library_dirs or ()]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "probe.cpp").write_text(code, encoding="utf-8")
            command = [*compiler.words, "probe.cpp", *(["/link"] if msvc else []), *words]
            done = subprocess.run(command, cwd=folder, capture_output=True, errors="replace")
        if done.returncode and verbose:
            self.warning(f"{funcname} was not found in {', '.join(libraries)}: {done.stderr}")
        return done.returncode == 0

    def cpu_arch(self) -> str:
        """Return the compiler's flag for this very processor; empty for cl, which has none."""
        if sys.platform == "win32":
            return ""
        return "-mcpu=native" if platform.machine().startswith("ppc") else "-march=native"

    def simd_width(self) -> str:
        """Return upstream's macro for the widest vectors of this processor."""
        names = {"AVX512": "-D__AVX512__", "AVX2": "-D__AVX256__"}
        return names.get(torch.backends.cpu.get_cpu_capability(), "-D__SCALAR__")

    def validate_torch_version(self, torch_info: dict[str, str]) -> None:
        """Compare the torch that an op was compiled with (``{"version": "2.3"}``) with this one.

        Raises:
            RuntimeError: they differ in major or minor version.
        """
        ours = ".".join(torch.__version__.split(".")[:2])
        if torch_info["version"] != ours:
            raise RuntimeError(
                explain(
                    f"the op {self.name} was compiled for another torch",
                    got=ours,
                    expected=torch_info["version"],
                    fix="Compile it again, or install that torch.",
                )
            )

    def validate_torch_op_version(self, torch_info: dict[str, str]) -> None:
        """Compare the torch and the CUDA that an op was compiled with with those here.

        Raises:
            RuntimeError: they differ in major or minor version.
        """
        self.validate_torch_version(torch_info)
        ours = ".".join(str(torch.version.cuda).split(".")[:2])
        if torch.cuda.is_available() and torch_info["cuda_version"] != ours:
            raise RuntimeError(
                explain(
                    f"the op {self.name} was compiled for another CUDA",
                    got=ours,
                    expected=torch_info["cuda_version"],
                    fix="Compile it again, or install a torch for that CUDA.",
                )
            )

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
        return source.obstacle(self.source_op())


class CUDAOpBuilder(OpBuilder):
    """Legacy base of the ops that have CUDA sources.

    Attributes:
        jit_mode: whether the op is compiled now, by torch, which takes the GPUs from TORCH_CUDA_ARCH_LIST.
        enable_bf16: whether all GPUs that were chosen last compute in bf16.
    """

    WITH_CUDA: ClassVar[bool] = True

    jit_mode = False
    enable_bf16 = False
    _jit_arch_list: str | None = None

    def filter_ccs(self, ccs: list[str]) -> list[list[str]]:
        """Return the compute capabilities that the op supports, each as [major, minor]; a subclass may drop some."""
        return [cc.split(".") for cc in ccs]

    def compute_capability_args(self, cross_compile_archs: list[str] | None = None) -> list[str]:
        """Choose the GPUs to compile for, and note them in TORCH_CUDA_ARCH_LIST.

        Args:
            cross_compile_archs: capabilities as ``"8.0"`` or ``"9.0+PTX"``; None: TORCH_CUDA_ARCH_LIST, else the
                GPUs of this machine.

        Returns:
            nvcc's flags for them; none while the op is compiled by torch, which adds them itself.

        Raises:
            RuntimeError: none is left, or this is a forked process, which must not look for them.
        """
        listed = self._jit_arch_list or env.TORCH_CUDA_ARCH_LIST.get() or ""
        named = cross_compile_archs or [word for word in re.split("[; ]", listed) if word]
        probed = not named
        if probed:
            named = [f"{major}.{minor}" for major, minor in self._devices()]
        supported = self.filter_ccs(_sorted(named))
        if not supported:
            raise RuntimeError(
                explain(
                    f"no GPU is known that {self.name} could be compiled for",
                    got=", ".join(named) or "no CUDA devices here",
                    fix="Set TORCH_CUDA_ARCH_LIST, for example to 8.0;9.0.",
                )
            )
        if (self.jit_mode or probed) and not supported[-1][1].endswith(_PTX):
            supported[-1][1] += _PTX  # newer GPUs run that, too
        self.enable_bf16 = all(int(major) >= 8 for major, _ in supported)
        env.TORCH_CUDA_ARCH_LIST.set(";".join(".".join(cc) for cc in supported))
        return [] if self.jit_mode else _gencode(supported)

    def source_op(self) -> source.SourceOp:
        """Return what the methods above say of the sources, as the compilation takes it."""
        op = super().source_op()
        if not (self.jit_mode and self.enable_bf16):
            return op
        bf16 = ("-DBF16_AVAILABLE",)
        return op._replace(flags=op.flags + bf16, cuda_flags=op.cuda_flags + bf16)

    def cuda_capability_major(self) -> int | None:
        """Return the first number of the device's compute capability; None where asking would start CUDA."""
        if not torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork():
            return None
        return int(torch.cuda.get_device_properties(0).major)

    def jit_load(self, verbose: bool = True) -> Any:
        """Compile the sources, unless that was done before; TORCH_CUDA_ARCH_LIST is as before afterwards.

        Raises:
            RuntimeError: there is nothing to compile, no way to, or the compiler refuses it; its words are in the
                message.
        """
        before = env.TORCH_CUDA_ARCH_LIST.raw()
        self.jit_mode, self._jit_arch_list = torch.cuda.is_available(), before
        try:
            return super().jit_load(verbose)
        finally:
            self.jit_mode, self._jit_arch_list = False, None
            if before is None:
                env.TORCH_CUDA_ARCH_LIST.unset()
            else:
                env.TORCH_CUDA_ARCH_LIST.set(before)

    def _devices(self) -> list[tuple[int, int]]:
        if torch.cuda._is_in_bad_fork():
            raise RuntimeError(
                explain(
                    f"the GPUs to compile {self.name} for cannot be looked for",
                    got="a forked process, whose parent uses CUDA",
                    fix="Set TORCH_CUDA_ARCH_LIST, for example to 8.0;9.0, or load the op before the fork.",
                )
            )
        return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


class TorchCPUOpBuilder(CUDAOpBuilder):
    """Legacy base of the CPU ops."""

    WITH_CUDA: ClassVar[bool] = False


def _sorted(ccs: Iterable[str]) -> list[str]:
    """Each capability once, lowest first; with PTX if one of its mentions has it."""
    ptx: dict[str, bool] = {}
    for cc in ccs:
        number = cc.removesuffix(_PTX)
        ptx[number] = ptx.get(number, False) or cc.endswith(_PTX)

    def order(number: str) -> tuple[int, int, str]:
        major, minor = number.split(".")
        digits = minor.rstrip("abcdefghijklmnopqrstuvwxyz")
        return int(major), int(digits), minor

    return [number + _PTX * ptx[number] for number in sorted(ptx, key=order)]


def _gencode(ccs: list[list[str]]) -> list[str]:
    flags = []
    for major, minor in ccs:
        number = major + minor.removesuffix(_PTX)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if minor.endswith(_PTX):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags
