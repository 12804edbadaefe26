# SPDX-License-Identifier: Apache-2.0
"""Threads that step back: work beside training runs where training leaves a core idle."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading

_NICER = 10
_LOWEST = -2  # THREAD_PRIORITY_LOWEST


def step_back() -> None:
    """Give the calling thread a lower priority for the rest of its life.

    On Linux the threads that it starts from now on have it too. Does nothing where a thread has no priority of its own.
    """
    if sys.platform == "win32":
        kernel = ctypes.windll.kernel32
        kernel.GetCurrentThread.restype = ctypes.c_void_p
        kernel.SetThreadPriority(ctypes.c_void_p(kernel.GetCurrentThread()), _LOWEST)
    elif sys.platform == "linux":  # elsewhere this number would be taken for a process
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            own = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(own + _NICER, 19))
