# SPDX-License-Identifier: Apache-2.0
"""NVRTC through ctypes: CUDA source in, cubin or PTX out. Imports the standard library alone.

The build (op_builder/kernels.py) and the run time compile by this one file, so neither way can rot.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# The kernels need C++17 only; contraction of a*b+c is the default of every CUDA compiler.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
_KERNEL = re.compile(r"^DS_KERNEL\s+(\w+)\s*\(([^)]*)\)", re.MULTILINE)
# a scalar of a kernel -> its code in the struct module
_SCALARS = {"i32": "i", "i64": "q", "float": "f"}


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refused a source; the message holds its log."""


def entries(source: str) -> dict[str, str]:
    """Return the kernels that a source defines, each with its arguments as codes of the struct module.

    Raises:
        NvrtcError: an argument is neither a pointer, i32, i64 nor float. See [Note: kernel arguments].
    """
    found = {}
    for name, arguments in _KERNEL.findall(source):
        codes = ""
        for argument in arguments.split(","):
            kind = argument.replace("const ", "").rpartition(" ")[0].strip()
            code = "P" if "*" in argument else _SCALARS.get(kind)
            if code is None:
                raise NvrtcError(f"kernel {name}: argument '{argument.strip()}' cannot be passed")
            codes += code
        found[name] = codes
    return found


class Nvrtc:
    """One loaded NVRTC.

    Attributes:
        path: the file it came from.
        version: (major, minor).

    Raises:
        NvrtcError: the library cannot be loaded, or is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # It opens its builtins by bare name; a library that is loaded already is found so everywhere.
            self._builtins = [ctypes.CDLL(str(other)) for other in _builtins_beside(path)]
            self._dll = ctypes.CDLL(str(path))
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._dll.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError) as error:
            raise NvrtcError(f"NVRTC cannot be loaded from {path}: {error}") from error
        self._dll.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.version = (major.value, minor.value)

    def architectures(self) -> tuple[int, ...]:
        """Return what it compiles for, as 80 for sm_80."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(numbers)

    def compile(self, name: str, source: str, headers: Mapping[str, str], arch: str) -> bytes:
        """Compile one source.

        Args:
            name: file name for messages.
            source: its text.
            headers: every header that it may include, by the name in the include line.
            arch: ``sm_80`` gives a cubin, ``compute_80`` gives PTX.

        Raises:
            NvrtcError: it does not compile; the message is the compiler's log.
        """
        program = ctypes.c_void_p()
        texts = [text.encode() for text in headers.values()]
        names = [header.encode() for header in headers]
        many = ctypes.c_char_p * len(headers)
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            many(*texts),
            many(*names),
        )
        try:
            options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
            given = (ctypes.c_char_p * len(options))(*options)
            status = self._dll.nvrtcCompileProgram(program, len(options), given)
            if status:
                log = self._take(program, "ProgramLog").rstrip(b"\0").decode("utf-8", "replace")
                raise NvrtcError(f"{name} does not compile for {arch}: {log.strip() or status}")
            return self._take(program, "CUBIN" if arch.startswith("sm_") else "PTX")
        finally:
            self._dll.nvrtcDestroyProgram(ctypes.byref(program))

    def _take(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        try:
            status = getattr(self._dll, function)(*arguments)
        except AttributeError as error:
            raise NvrtcError(f"{self.path} lacks {function}") from error
        if status:
            told = self._dll.nvrtcGetErrorString(status)
            raise NvrtcError(f"{function}: {told.decode() if told else status}")


def candidates(torch_folder: Path | None = None) -> Iterator[Path]:
    """Yield the NVRTC files of this Python: pip's packages (as CUDA builds of torch need them), then torch's own."""
    names = ("nvrtc64_*.dll",) if sys.platform == "win32" else ("libnvrtc.so.*",)
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for root in () if spec is None else (spec.submodule_search_locations or ()):
        for below in ("cuda_nvrtc", "cu13", "cu14"):
            folders += [Path(root) / below / part for part in ("lib", "bin", "bin/x86_64")]
    if torch_folder is not None:
        folders.append(torch_folder / "lib")
    for folder in folders:
        for name in names:
            # "alt" builds trade speed for size; they come in pairs with the usual one
            yield from sorted(p for p in folder.glob(name) if ".alt" not in p.name)


def find(torch_folder: Path | None = None) -> Nvrtc:
    """Return the first NVRTC that loads.

    Raises:
        NvrtcError: there is none, or each one fails (the message names them).
    """
    problems = []
    for path in candidates(torch_folder):
        try:
            return Nvrtc(path)
        except NvrtcError as error:
            problems.append(str(error))
    raise NvrtcError(
        "; ".join(problems)
        or "no NVRTC is installed (pip install nvidia-cuda-nvrtc-cu12, or a CUDA build of torch)"
    )


def _builtins_beside(path: Path) -> list[Path]:
    pattern = "nvrtc-builtins64_*.dll" if path.suffix == ".dll" else "libnvrtc-builtins.so.*"
    return sorted(p for p in path.parent.glob(pattern) if ".alt" not in p.name)
