# SPDX-License-Identifier: Apache-2.0
"""The order in which modules need their parameters, recorded in one pass and followed in the next ones.

See [Note: Looking ahead] in residency.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any


class Record:
    """Module visits of one kind of pass.

    Attributes:
        steps: numbers of the modules, in the order of their visits.
        complete: whether the record is of a whole pass, so that it can be followed.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.complete = False
        self._at = 0
        self._looked_to = 0
        self._lost = False
        self._before: list[int] = []
        self._uses: dict[int, list[int]] = {}

    def begin(self) -> None:
        """A pass begins; one that left the record has it made anew."""
        if self._lost or not self.complete:
            self.forget()
        self._at = self._looked_to = 0

    def forget(self) -> None:
        """Have the next pass recorded, whatever is known."""
        self.steps.clear()
        self.complete = self._lost = False
        self._at = self._looked_to = 0

    def visit(self, step: int) -> None:
        """A module needs its parameters now."""
        if not self.complete:
            self.steps.append(step)
        elif not self._lost and self._at < len(self.steps) and self.steps[self._at] == step:
            self._at += 1
            self._looked_to = max(self._looked_to, self._at)
        else:
            self._lost = True

    def end(self, weigh: Callable[[int], int]) -> None:
        """The pass is over. `weigh` tells the elements that a module needs."""
        if self.complete:
            self._lost = self._lost or self._at != len(self.steps)
            return
        self.complete = bool(self.steps)
        self._before = list(accumulate((weigh(s) for s in self.steps), initial=0))
        self._uses.clear()

    @property
    def following(self) -> bool:
        """Whether what comes next is known."""
        return self.complete and not self._lost

    def window(self, numel: int) -> Iterator[int]:
        """Modules that come within `numel` elements and have not been looked at; `looked()` after each."""
        while (
            self.following
            and self._looked_to < len(self.steps)
            and self._before[self._looked_to] - self._before[self._at] < numel
        ):
            yield self.steps[self._looked_to]

    def looked(self) -> None:
        """The module that `window` gave is being gathered."""
        self._looked_to += 1

    def soon(self, param: Any, needs: Callable[[int], list[Any]], distance: int) -> bool:
        """Whether `param` is needed again in fewer than `distance` elements: for 0, never."""
        if not self.following:
            return False
        if not self._uses:
            for at, step in enumerate(self.steps):
                for each in needs(step):
                    self._uses.setdefault(id(each), []).append(at)
        uses = self._uses.get(id(param), [])
        nearest = bisect_left(uses, self._at)
        return (
            nearest < len(uses) and self._before[uses[nearest]] - self._before[self._at] < distance
        )
