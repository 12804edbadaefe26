# SPDX-License-Identifier: Apache-2.0
"""Lazy package doors (PEP 562): a table of public name -> module, looked up on first use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_exports(
    package: str, table: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` for a package's ``__init__``.

    A name that the table lacks may be that of a module in the package, which is then imported: programs write
    ``deepspeed.runtime.lr_schedules`` after ``import deepspeed`` alone.

    Args:
        package: the package's ``__name__``.
        table: module (relative to the package, ".name") -> names that it provides. The name "*"
            stands for the module itself.

    Returns:
        The three values, in this order, to be bound at the package's top level.

    Example:
        ``__getattr__, __dir__, __all__ = lazy_exports(__name__, {".timer": ["NoopTimer"]})``
    """
    home: dict[str, tuple[str, str | None]] = {}
    for module, names in table.items():
        for name in names:
            if name == "*":
                home[module.lstrip(".")] = (module, None)
            else:
                home[name] = (module, name)

    def get(name: str) -> Any:
        if name not in home and _is_module(package, name):
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = home[name]
        loaded = importlib.import_module(module, package)
        value = loaded if attribute is None else getattr(loaded, attribute)
        setattr(sys.modules[package], name, value)  # the next look-up is a plain one
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return get, listing, sorted(home)


def _is_module(package: str, name: str) -> bool:
    if name.startswith("__") or not hasattr(sys.modules[package], "__path__"):
        return False
    return importlib.util.find_spec(f"{package}.{name}") is not None
