# SPDX-License-Identifier: Apache-2.0
"""A thread that steps back does so alone, with the threads that it starts."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepspeed.utils.thread_priority import step_back


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_only_the_thread_and_those_it_starts_step_back() -> None:
    def stepped() -> tuple[int, int]:
        step_back()
        with ThreadPoolExecutor(1) as pool:
            return niceness(), pool.submit(niceness).result()

    before = niceness()
    with ThreadPoolExecutor(1) as pool:
        own, started = pool.submit(stepped).result()
    assert own == started == min(before + 10, 19)
    assert niceness() == before


def test_stepping_back_works_on_every_system() -> None:
    thread = threading.Thread(target=step_back)
    thread.start()
    thread.join()
    assert not thread.is_alive()
