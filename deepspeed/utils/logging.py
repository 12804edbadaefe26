# SPDX-License-Identifier: Apache-2.0
"""The package's one logger, and its helpers that speak for chosen ranks only."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from .errors import explain

LOG_FORMAT = "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"

log_levels = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class _StdoutHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is now, so that redirection after import is respected."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


class LoggerFactory:
    """Makes loggers in the package's format."""

    @staticmethod
    def create_logger(name: str | None = None, level: int = logging.WARNING) -> logging.Logger:
        """Return the logger ``name``, writing to stdout, not propagating to the root logger.

        Raises:
            ValueError: no name was given.
        """
        if not name:
            raise ValueError(explain("a logger needs a name", got=name, expected="a text"))
        made = logging.getLogger(name)
        made.setLevel(level)
        made.propagate = False
        if not any(isinstance(handler, _StdoutHandler) for handler in made.handlers):
            handler = _StdoutHandler()
            handler.setFormatter(logging.Formatter(LOG_FORMAT))
            made.addHandler(handler)
        return made


logger = LoggerFactory.create_logger("DeepSpeed")


def _rank() -> int:
    """Return this process's rank, or -1 while torch.distributed has no default group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return -1
    return distributed.get_rank()


def get_dist_msg(message: object, ranks: Sequence[int] | None = None) -> str | None:
    """Return ``[Rank N] message`` when this rank is to speak, else None.

    Before torch.distributed is initialised every process speaks, as rank -1. Afterwards ``ranks``
    decides: None or empty is nobody, a first element of -1 everybody.
    """
    rank = _rank()
    chosen = list(ranks or ())
    if rank >= 0 and not (chosen and (chosen[0] == -1 or rank in chosen)):
        return None
    return f"[Rank {rank}] {message}"


def log_dist(
    message: object, ranks: Sequence[int] | None = None, level: int = logging.INFO
) -> None:
    """Log a message on the given ranks (see `get_dist_msg` for who speaks)."""
    if logger.isEnabledFor(level):
        text = get_dist_msg(message, ranks)
        if text is not None:
            logger.log(level, text, stacklevel=2)


_said: set[object] = set()


def _once(key: object) -> bool:
    if key in _said:
        return False
    _said.add(key)
    return True


def log_dist_once(
    message: object, ranks: Sequence[int] | None = None, level: int = logging.INFO
) -> None:
    """Like `log_dist`, but the same message to the same ranks is logged once a process."""
    if _once((str(message), tuple(ranks or ()), level)):
        log_dist(message, ranks, level)


def warning_once(message: object) -> None:
    """Log a warning the first time that this message comes up in the process."""
    if _once(str(message)):
        logger.warning(message, stacklevel=2)


def print_dist(message: object, ranks: Sequence[int] | None = None) -> None:
    """Print a message on the given ranks (see `get_dist_msg` for who speaks)."""
    text = get_dist_msg(message, ranks)
    if text is not None:
        print(text)


def print_json_dist(
    message: dict[str, Any], ranks: Sequence[int] | None = None, path: str | None = None
) -> None:
    """Write ``message``, with the rank added, as JSON to ``path`` on the given ranks."""
    if get_dist_msg("", ranks) is None:
        return
    record = {**message, "rank": _rank()}
    if path is None:
        print(json.dumps(record))
        return
    with open(path, "w", encoding="utf-8") as outfile:
        json.dump(record, outfile)


def print_configuration(args: object, name: str) -> None:
    """Log the attributes of ``args`` one a line, sorted, under the heading ``name``."""
    logger.info("%s:", name)
    for key in sorted(vars(args)):
        logger.info("  %s %s %s", key, "." * max(1, 29 - len(key)), getattr(args, key))


def get_log_level_from_string(name: str) -> int:
    """Return the level called ``name`` (debug, info, warning, error, critical; any case).

    Raises:
        ValueError: there is no such level.
    """
    level = log_levels.get(str(name).lower())
    if level is None:
        raise ValueError(
            explain("unknown log level", got=repr(name), expected=", ".join(log_levels))
        )
    return level


def set_log_level_from_string(name: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of the package's logger, or of another one, by name."""
    (custom_logger or logger).setLevel(get_log_level_from_string(name))


def get_current_level() -> int:
    """Return the level in force for the package's logger."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str: str) -> bool:
    """Say whether the logger's level is at or below (as talkative as) the named one."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)


def get_caller_func(frame: int = 3) -> str:
    """Return the name of the function ``frame`` calls up (1: whoever called this one)."""
    return sys._getframe(frame).f_code.co_name
