# SPDX-License-Identifier: Apache-2.0
"""Reaching a part of a module by its dotted name, as `named_modules` and `named_parameters` give it."""

from __future__ import annotations

from functools import reduce
from typing import Any


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
