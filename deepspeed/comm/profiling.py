# SPDX-License-Identifier: Apache-2.0
"""Switches of the communication logger, and the wrapper that hands it each collective."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.comms_logging import CommsLogger
from deepspeed.utils.logging import get_caller_func

from .utils import message_bytes

comms_logger = CommsLogger()


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Set the communication logger, from a configuration and from single values (which win)."""
    section = getattr(deepspeed_config, "comms_config", None)
    if section is not None and section.comms_logger_enabled:
        comms_logger.configure(section)
    for name, value in (
        ("enabled", enabled),
        ("prof_all", prof_all),
        ("prof_ops", prof_ops),
        ("verbose", verbose),
        ("debug", debug),
    ):
        if value is not None:
            setattr(comms_logger, name, value)


def reset_log() -> None:
    """Forget what was recorded."""
    comms_logger.reset_data()


def has_comm_data() -> bool:
    """Say whether anything was recorded."""
    return comms_logger.has_data()


def get_comm_operation_count() -> int:
    """Return the number of recorded calls."""
    return comms_logger.get_total_operations()


def get_logged_comm_ops() -> list[str]:
    """Return the names of the recorded operations."""
    return comms_logger.get_operation_names()


def recorded(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb the logger's arguments (prof, log_name, debug), and record it when asked.

    Asynchronous calls are timed until the device has done what they launched, or, where that
    cannot be waited for (gloo), until they are launched.
    """

    def wrap(verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def call(
            *args: Any, prof: bool = False, log_name: str = name, debug: str = "", **kwargs: Any
        ) -> Any:
            if not comms_logger.records(name, prof):
                return verb(*args, **kwargs)
            size = message_bytes(args, kwargs)
            label = f"{log_name} | [Caller Func: {debug or get_caller_func(2)}]"
            get_accelerator().synchronize()
            start = time.perf_counter()
            result = verb(*args, **kwargs)
            get_accelerator().synchronize()
            milliseconds = (time.perf_counter() - start) * 1e3
            comms_logger.append(name, label if comms_logger.debug else log_name, milliseconds, size)
            return result

        return call

    return wrap


_inside = threading.local()


def watched(name: str, message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Record a verb of the engine (`deepspeed.comm.flat`) under its public name, when asked.

    A recorded call is waited for at once, so that its time is its own and not that of what overlaps
    it: training is slower while the logger is on. Verbs that a verb calls are part of it.

    Args:
        name: the public verb that it amounts to.
        message: the parameter that is the message.
    """

    def wrap(verb: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(verb)

        @functools.wraps(verb)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not comms_logger.records(name, False) or getattr(_inside, "verb", False):
                return verb(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            axis, tensor = given["axis"], given[message]
            if axis.size == 1 or tensor.numel() == 0:
                return verb(*args, **kwargs)
            label = f"{name} | [Caller Func: {get_caller_func(2)}]" if comms_logger.debug else name
            get_accelerator().synchronize()
            start = time.perf_counter()
            _inside.verb = True
            try:
                result = verb(*args, **kwargs)
                if result is not None:
                    result.wait()
            finally:
                _inside.verb = False
            get_accelerator().synchronize()
            size = tensor.numel() * tensor.element_size()
            milliseconds = (time.perf_counter() - start) * 1e3
            comms_logger.append(name, label, milliseconds, size, axis.size)
            return result

        return call

    return wrap
