# SPDX-License-Identifier: Apache-2.0
"""Which parameters and gradients may travel in autocast's dtype: those of modules that autocast computes in it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch

from deepspeed.utils.errors import explain

PARAM_COMM_DTYPE_ATTR_NAME = "comm_dtype"

Function = TypeVar("Function", bound=Callable[..., Any])

_SAFE_MODULES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def get_default_autocast_lower_precision_modules() -> list[str]:
    """Full names of the classes that `torch_autocast.lower_precision_safe_modules` stands for where it is absent."""
    return [f"{kind.__module__}.{kind.__name__}" for kind in _SAFE_MODULES]


def init_autocast_params(
    module: torch.nn.Module, dtype: torch.dtype, safe_modules: Iterable[str]
) -> None:
    """Mark the parameters of safe modules: between ranks they and their gradients travel in `dtype`.

    Args:
        module: the model.
        dtype: autocast's dtype.
        safe_modules: full names of classes; subclasses do not count.

    Raises:
        ValueError: a name that cannot be imported.
    """
    kinds = {_class_of(name) for name in safe_modules}
    for each in module.modules():
        if type(each) in kinds:
            for param in each.parameters(recurse=False):
                if param.is_floating_point():
                    setattr(param, PARAM_COMM_DTYPE_ATTR_NAME, dtype)


def forget_autocast_params(module: torch.nn.Module) -> None:
    """Take the marks of `init_autocast_params` off again: another engine may not compute so."""
    for param in module.parameters():
        vars(param).pop(PARAM_COMM_DTYPE_ATTR_NAME, None)


def has_comm_dtype(param: torch.nn.Parameter) -> bool:
    """Whether `init_autocast_params` marked a parameter."""
    return hasattr(param, PARAM_COMM_DTYPE_ATTR_NAME)


def get_comm_dtype(param: torch.nn.Parameter) -> torch.dtype:
    """The dtype in which a parameter's gradient travels if nothing else is configured: its mark, or its own."""
    return getattr(param, PARAM_COMM_DTYPE_ATTR_NAME, param.dtype)


def autocast_of(kind: str) -> tuple[bool, torch.dtype]:
    """Whether operations on devices of a type are under autocast now, and its dtype."""
    try:
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    except (TypeError, AttributeError):  # torch 2.3 asks each kind by a function of its own
        if kind == "cpu":
            return torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
        return torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()


def without_autocast(function: Function) -> Function:
    """Have a function of tensors, all on one device, compute in the dtypes that it chooses, under autocast too."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return cast(Function, run)


def _class_of(name: str) -> type:
    place, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(place), kind)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise ValueError(
            explain(
                "torch_autocast.lower_precision_safe_modules names no class",
                got=name,
                expected="the full name of a module class, such as torch.nn.Linear",
                fix="correct the name, or leave the key out",
            )
        )
    return found
