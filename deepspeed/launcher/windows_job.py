# SPDX-License-Identifier: Apache-2.0
"""A Windows job object: a set of processes with all their descendants, which dies as one.

The system keeps the set, so that a grandchild whose parent is gone still belongs, and kills it when the
last handle closes: also when this process is itself killed. Loaded on Windows only.
"""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import wintypes

CREATE_SUSPENDED = 0x00000004

_EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
_KILL_ON_JOB_CLOSE = 0x00002000


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", wintypes.DWORD),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", wintypes.DWORD),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", wintypes.DWORD),
        ("SchedulingClass", wintypes.DWORD),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


def _kernel32() -> ctypes.WinDLL:
    """Return kernel32 with the prototypes used here: a handle is as wide as a pointer."""
    lib = ctypes.WinDLL("kernel32", use_last_error=True)
    handle = wintypes.HANDLE
    lib.CreateJobObjectW.restype = handle
    lib.CreateJobObjectW.argtypes = (ctypes.c_void_p, wintypes.LPCWSTR)
    lib.SetInformationJobObject.argtypes = (handle, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD)
    lib.AssignProcessToJobObject.argtypes = (handle, handle)
    lib.TerminateJobObject.argtypes = (handle, wintypes.UINT)
    lib.CloseHandle.argtypes = (handle,)
    return lib


class Job:
    """One job object, made empty, killing its members when it is closed.

    Raises:
        OSError: the system gives none.
    """

    def __init__(self) -> None:
        self._lib = _kernel32()
        self._handle = self._lib.CreateJobObjectW(None, None)
        if not self._handle:
            raise ctypes.WinError(ctypes.get_last_error())
        self._set_limits(_KILL_ON_JOB_CLOSE)

    def _set_limits(self, flags: int) -> None:
        limits = _ExtendedLimits()
        limits.BasicLimitInformation.LimitFlags = flags
        if not self._lib.SetInformationJobObject(
            self._handle, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
        ):
            raise ctypes.WinError(ctypes.get_last_error())

    def adopt(self, process: subprocess.Popen) -> None:
        """Add a process; what it starts from now on belongs as well.

        Raises:
            OSError: it has ended, or another job forbids it.
        """
        if not self._lib.AssignProcessToJobObject(self._handle, int(process._handle)):
            raise ctypes.WinError(ctypes.get_last_error())

    def kill(self) -> None:
        """Kill every member at once."""
        self._lib.TerminateJobObject(self._handle, 1)

    def release(self) -> None:
        """Let the members live on, and give the job up."""
        self._set_limits(0)
        self._lib.CloseHandle(self._handle)


def resume(process: subprocess.Popen) -> None:
    """Let a process that was made with CREATE_SUSPENDED run.

    Raises:
        OSError: the system refuses.
    """
    ntdll = ctypes.WinDLL("ntdll")
    ntdll.NtResumeProcess.argtypes = (wintypes.HANDLE,)
    status = ntdll.NtResumeProcess(int(process._handle))
    if status < 0:
        raise OSError(f"process {process.pid} cannot be resumed (status {status & 0xFFFFFFFF:#x})")
