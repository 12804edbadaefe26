# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver through ctypes: contexts, modules and launches. Opened at the first use, never at import.

torch works in each device's primary context, through the runtime library; we retain the same one, so pointers and
streams of torch are ours as well.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import NamedTuple

from deepspeed.utils.errors import DeepSpeedError, explain

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_SEARCH_SYSTEM32 = 0x00000800  # LOAD_LIBRARY_SEARCH_SYSTEM32: no driver from the current folder

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_LOG_BYTES = 8192
_THREADS = 256  # kThreads of csrc/cuda/base.cuh
# the `extra` list of cuLaunchKernel
_PARAM_END, _PARAM_BUFFER, _PARAM_SIZE = 0, 1, 2

# name in the library -> types of its arguments; each returns a status
_FUNCTIONS = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuModuleLoadDataEx": (c_void_p, c_void_p, c_uint, c_void_p, c_void_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *([c_uint] * 7), c_void_p, c_void_p, c_void_p),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
}


class CudaDriverError(DeepSpeedError, RuntimeError):
    """The driver is missing, too old, or refused a call; the message names the call and the driver's words."""


class Function(NamedTuple):
    """A kernel of a loaded module, ready to launch.

    Attributes:
        name: its name, for messages.
        handle: the driver's handle.
        layout: packs its arguments into one buffer, each on its natural boundary.
    """

    name: str
    handle: int
    layout: struct.Struct


class Driver:
    """A loaded and initialised driver library.

    Args:
        library: path or name of the library; the system's driver by default.

    Raises:
        CudaDriverError: there is none, it lacks a function, or it cannot start.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            if sys.platform == "win32" and library == LIBRARY:
                self._dll = ctypes.CDLL(library, winmode=_SEARCH_SYSTEM32)
            else:
                self._dll = ctypes.CDLL(library)
            for name, arguments in _FUNCTIONS.items():
                getattr(self._dll, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise CudaDriverError(
                explain(
                    f"the CUDA driver cannot be used: {error}", fix="Install or update the driver."
                )
            ) from error
        self._launch = self._dll.cuLaunchKernel
        self._get_current = self._dll.cuCtxGetCurrent
        self._primary: dict[int, int] = {}
        self._lock = threading.Lock()
        self._call("cuInit", 0)
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        self.version = version.value

    def capability(self, device: int) -> tuple[int, int]:
        """Return the compute capability of a device as (major, minor)."""
        handle = self._device(device)
        numbers = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            value = c_int()
            self._call("cuDeviceGetAttribute", byref(value), attribute, handle)
            numbers.append(value.value)
        return numbers[0], numbers[1]

    def load(self, device: int, image: bytes, kernels: dict[str, str]) -> dict[str, Function]:
        """Load a cubin or PTX into the primary context of a device, and find its kernels.

        Args:
            device: index of the device.
            image: the compiled code; PTX ends with a zero byte.
            kernels: argument codes by kernel name (of the struct module: P, q, i, f).

        Raises:
            CudaDriverError: the driver refuses the image, or a kernel is not in it.
        """
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        module = c_void_p()
        entered = self._enter(device)
        try:
            status = self._dll.cuModuleLoadDataEx(byref(module), image, 2, options, values)
            if status:
                said = log.value.decode("utf-8", "replace").strip()
                raise self._error("cuModuleLoadDataEx", status, said)
            found = {}
            for name, codes in kernels.items():
                handle = c_void_p()
                self._call("cuModuleGetFunction", byref(handle), module, name.encode("ascii"))
                found[name] = Function(name, handle.value or 0, struct.Struct("@" + codes))
            return found
        finally:
            self._leave(entered)

    def launch(
        self, device: int, function: Function, stream: int, blocks: int, *args: object
    ) -> None:
        """Launch a kernel on a stream of a device, from any thread; returns at once.

        Args:
            device: index of the device that the stream and all pointers belong to.
            function: from `load` on that device.
            stream: the stream's handle, 0 for the default stream.
            blocks: blocks of the grid, which has one dimension; each has 256 threads.
            args: the kernel's arguments: addresses (0 for null), integers and floats.

        Raises:
            CudaDriverError: the driver refuses.
            struct.error: the arguments are not those of the kernel.
        """
        packed = function.layout.pack(*args)
        size = c_size_t(len(packed))
        # The driver copies the buffer before it returns.
        extra = (c_void_p * 5)(
            _PARAM_BUFFER,
            ctypes.cast(packed, c_void_p),
            _PARAM_SIZE,
            ctypes.addressof(size),
            _PARAM_END,
        )
        entered = self._enter(device)
        status = self._launch(
            function.handle, blocks, 1, 1, _THREADS, 1, 1, 0, stream or None, None, extra
        )
        self._leave(entered)
        if status:
            raise self._error(f"launch of {function.name}", status)

    def _enter(self, device: int) -> bool:
        """Make the device's primary context current; returns whether `_leave` has to pop it.

        A thread that has no context yet, as autograd's, keeps it; a thread at work on another device gets its own
        back.
        """
        current = c_void_p()
        status = self._get_current(byref(current))
        if status:
            raise self._error("cuCtxGetCurrent", status)
        primary = self._primary.get(device) or self._retain(device)
        if current.value == primary:
            return False
        if not current.value:
            self._call("cuCtxSetCurrent", primary)
            return False
        self._call("cuCtxPushCurrent_v2", primary)
        return True

    def _leave(self, entered: bool) -> None:
        if entered:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _retain(self, device: int) -> int:
        # Retained once a process and never released: torch keeps it alive as long.
        with self._lock:
            if device not in self._primary:
                context = c_void_p()
                self._call("cuDevicePrimaryCtxRetain", byref(context), self._device(device))
                self._primary[device] = context.value or 0
            return self._primary[device]

    def _device(self, index: int) -> int:
        handle = c_int()
        self._call("cuDeviceGet", byref(handle), index)
        return handle.value

    def _call(self, function: str, *args: object) -> None:
        status = getattr(self._dll, function)(*args)
        if status:
            raise self._error(function, status)

    def _error(self, call: str, status: int, said: str = "") -> CudaDriverError:
        words = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            if not getattr(self._dll, function)(status, byref(text)) and text.value:
                words.append(text.value.decode("utf-8", "replace"))
        described = ": ".join(words) or f"status {status}"
        return CudaDriverError(
            f"CUDA driver: {call} failed with {described}" + (f" ({said})" if said else "")
        )
