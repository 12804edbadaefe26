# SPDX-License-Identifier: Apache-2.0
"""Reaching a part of a module by its dotted name, as `named_modules` gives it; a module in evaluation mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import reduce
from typing import Any

from torch import nn


def recursive_getattr(model: Any, module_name: str) -> Any:
    """Return the attribute of `model` at a dotted name.

    Raises:
        AttributeError: there is none.

    Example:
        >>> import torch
        >>> recursive_getattr(torch.nn.Sequential(torch.nn.Linear(2, 3)), "0.weight").shape
        torch.Size([3, 2])
    """
    return reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Replace the attribute of `model` at a dotted name by `module`.

    Raises:
        AttributeError: its owner is not there.
    """
    owner, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, owner) if owner else model, name, module)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside; each part goes back to its own, which may be evaluation for good."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # outer parts first, which take inner ones with them; by `train`, where a part may do more than set its flag
        for part, training in modes:
            if part.training != training:
                part.train(training)
