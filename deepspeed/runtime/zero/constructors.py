# SPDX-License-Identifier: Apache-2.0
"""torch's own tensor constructors, for the library's work while `zero.Init` has put others in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

_plain: dict[str, Callable[..., torch.Tensor]] = {}


def remember(name: str) -> None:
    """Note `torch.<name>` as it is, before it is replaced."""
    _plain[name] = getattr(torch, name)


def forget() -> None:
    """The constructors are in their places again."""
    _plain.clear()


@contextlib.contextmanager
def plain_constructors() -> Iterator[None]:
    """Extent in which torch's constructors make what they are asked for: host buffers on the host, in their dtype."""
    replaced = {name: getattr(torch, name) for name in _plain}
    for name, constructor in _plain.items():
        setattr(torch, name, constructor)
    try:
        yield
    finally:
        for name, constructor in replaced.items():
            setattr(torch, name, constructor)
