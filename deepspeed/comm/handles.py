# SPDX-License-Identifier: Apache-2.0
"""What asynchronous verbs return: work that is done, or that will be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Handle(Protocol):
    """What an asynchronous verb returns."""

    def wait(self) -> Any:
        """Return when the result may be used."""


class _Done:
    """The handle of work that is finished already."""

    def wait(self) -> None:
        return None


DONE = _Done()


class _Pending:
    """Handle of running work, and of what is left to do here once it is over."""

    def __init__(
        self, works: Sequence[Any], finish: Callable[[], None] | None = None, keep: object = None
    ) -> None:
        self._works = list(works)
        self._finish = finish
        self._keep = keep  # buffers that the running work still reads

    def wait(self) -> None:
        for work in self._works:
            if work is not None:
                work.wait()
        finish, self._finish, self._keep, self._works = self._finish, None, None, []
        if finish is not None:
            finish()


def _close(handle: Handle, async_op: bool) -> Handle:
    if not async_op:
        handle.wait()
        return DONE
    return handle
