# SPDX-License-Identifier: Apache-2.0
"""Loader of the native CPU library: found, checked and bound through ctypes, at the first call of an op.

Importing this module never fails and touches no file. A missing library is no error: the ops then run by
their torch references, and `status` says why. A library that is there but cannot be used is an error,
raised when an op is first called, because somebody meant it to be used.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.ops import abi
from deepspeed.utils import env
from deepspeed.utils.errors import DeepSpeedError, explain

ABI_VERSION = 2
LIBRARY_DIR = Path(__file__).resolve().parent / "lib"
LIBRARY_NAME = {"win32": "ds_cpu.dll", "darwin": "libds_cpu.dylib"}.get(
    sys.platform, "libds_cpu.so"
)
REFERENCE = "reference"
ISAS = ("avx512", "avx2", "neon", "scalar")


class NativeLibraryError(DeepSpeedError, RuntimeError):
    """The native library is present and cannot be used; the message holds the cause and the cure."""


class Status(NamedTuple):
    """How native ops run: "native", "reference" or "broken"; why; and what the library offers.

    Attributes:
        route: one of the three words.
        reason: a sentence for people.
        isa: the instruction set in use, or "".
        available: every instruction set that this CPU and this library share, best first.
    """

    route: str
    reason: str
    isa: str = ""
    available: tuple[str, ...] = ()


class NativeLibrary:
    """A loaded library whose ABI was compared with ours.

    Raises:
        NativeLibraryError: it cannot be loaded, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # CDLL, not PyDLL: it lets go of the GIL during each call.
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise _broken(path, f"it cannot be loaded ({error})") from error
        try:
            self._bind()
        except AttributeError as error:
            raise _broken(path, f"it lacks a function ({error})") from error
        self._check()

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._dll.ds_isa().decode("ascii")

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets that can be chosen here, best first."""
        return tuple(self._dll.ds_isa_list().decode("ascii").split())

    def entry(self, symbol: str) -> Callable[[bytes], int]:
        """Return the kernel of that name; it takes one packed argument struct and returns a status."""
        function = getattr(self._dll, symbol)
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int
        return function

    def function(self, symbol: str, *arguments: Any, result: Any = ctypes.c_int) -> Any:
        """Return another function of the library, with these ctypes types."""
        function = getattr(self._dll, symbol)
        function.argtypes = list(arguments)
        function.restype = result
        return function

    def set_isa(self, name: str) -> None:
        """Choose an instruction set, or "auto".

        Raises:
            ValueError: this CPU or this library lacks it.
        """
        if self._dll.ds_set_isa(name.encode("ascii", "replace")):
            raise ValueError(
                explain(
                    "the native CPU library cannot run the requested instruction set",
                    got=name,
                    expected=", ".join((*self.isas, REFERENCE, "auto")),
                    fix="Correct or unset DS_CPU_ISA.",
                )
            )

    def error(self) -> str:
        """Return the message of the last failure on this thread."""
        return self._dll.ds_last_error().decode("utf-8", "replace")

    def _bind(self) -> None:
        dll = self._dll
        for name in ("ds_last_error", "ds_isa_list", "ds_isa"):
            getattr(dll, name).restype = ctypes.c_char_p
        dll.ds_set_isa.argtypes = [ctypes.c_char_p]
        dll.ds_abi_version.restype = ctypes.c_uint32
        dll.ds_abi_layout.restype = ctypes.c_uint32
        dll.ds_abi_layout.argtypes = [
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint32),
            ctypes.c_uint32,
        ]

    def _check(self) -> None:
        """Compare versions, sizes and offsets: a difference would corrupt memory, not raise."""
        version = self._dll.ds_abi_version()
        if version != ABI_VERSION:
            raise _broken(self.path, f"its ABI version is {version}, this package's {ABI_VERSION}")
        for name, structure in abi.STRUCTS.items():
            ours = [ctypes.sizeof(structure)]
            ours += [getattr(structure, field[0]).offset for field in structure._fields_]
            numbers = (ctypes.c_uint32 * 64)()
            count = self._dll.ds_abi_layout(name.encode("ascii"), numbers, 64)
            if list(numbers[:count]) != ours or abi.FORMATS[name].size != ours[0]:
                raise _broken(self.path, f"its layout of {name} differs from this package's")


def library_path() -> Path:
    """Return where the library is expected: DS_NATIVE_LIBRARY, else inside the package."""
    chosen = env.DS_NATIVE_LIBRARY.get()
    return Path(chosen) if chosen else LIBRARY_DIR / LIBRARY_NAME


def load() -> NativeLibrary | None:
    """Return the library, loaded once; None when the torch references are to be used.

    Raises:
        NativeLibraryError: the library is there and unusable.
        ValueError: DS_CPU_ISA names no path of this machine.
    """
    global _cached
    if _cached is None:
        _cached = _Cache(*_find(env.DS_CPU_ISA.get()))
    return _cached.library


def opened() -> NativeLibrary | None:
    """Return the library whatever DS_CPU_ISA and DS_DISABLE_NATIVE say of the ops; None where there is none.

    Raises:
        NativeLibraryError: the library is there and unusable.
    """
    path = library_path()
    if path not in _opened and path.exists():
        _opened[path] = NativeLibrary(path)
    return _opened.get(path)


def status() -> Status:
    """Return how native ops run here and why; never raises."""
    try:
        library = load()
    except (NativeLibraryError, ValueError) as error:
        return Status("broken", str(error))
    if library is None:
        assert _cached is not None
        return Status("reference", _cached.reason)
    return Status("native", f"{library.isa} path of {library.path.name}", library.isa, library.isas)


def use_isa(name: str) -> None:
    """Choose the path of every following native call; see `registry.use_isa`, which also tells the ops.

    Raises:
        ValueError: the name is unknown, or this CPU or this library lacks the path.
        NativeLibraryError: the library is there and unusable.
    """
    global _cached
    _cached = _Cache(*_find(name))


def last_error() -> str:
    """Return the library's message for the last failed call on this thread."""
    library = load()
    return library.error() if library is not None else "no native library"


def build_record() -> dict[str, object]:
    """Return what the build of this installation left on record (compiler, paths, problem), or {}."""
    try:
        text = (LIBRARY_DIR / "build.json").read_text(encoding="utf-8")
        record = json.loads(text)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class _Cache(NamedTuple):
    library: NativeLibrary | None
    reason: str


_cached: _Cache | None = None
_opened: dict[Path, NativeLibrary] = {}


def _find(isa: str | None) -> tuple[NativeLibrary | None, str]:
    name = (isa or "auto").strip().lower()
    if name == REFERENCE:
        return None, "DS_CPU_ISA=reference asks for the torch references"
    if env.DS_DISABLE_NATIVE.get():
        return None, "DS_DISABLE_NATIVE asks for the torch references"
    path = library_path()
    if not path.exists():
        if env.DS_NATIVE_LIBRARY.get():
            raise _broken(path, "the file named by DS_NATIVE_LIBRARY does not exist")
        if name != "auto":
            raise ValueError(
                explain(
                    "an instruction set is forced, but the native CPU library was not built",
                    got=name,
                    expected=f"{REFERENCE} or auto",
                    fix="Unset DS_CPU_ISA, or install again with a C++ compiler in reach.",
                )
            )
        problem = build_record().get("problem")
        why = f"it was not built: {problem}" if problem else f"there is no {path.name}"
        return None, f"no native CPU library ({why}); install again with a C++ compiler in reach"
    if path not in _opened:
        _opened[path] = NativeLibrary(path)
    library = _opened[path]
    library.set_isa(name)
    return library, ""


def _broken(path: Path, cause: str) -> NativeLibraryError:
    return NativeLibraryError(
        explain(
            f"the native CPU library {path} is unusable: {cause}",
            fix="Install deepspeed again (pip install --force-reinstall), "
            "or set DS_CPU_ISA=reference to run on torch alone.",
        )
    )
