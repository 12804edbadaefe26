# SPDX-License-Identifier: Apache-2.0
"""Why a pass failed: sharded parameters that code uses while only their slices are there, and ones that nothing used."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from deepspeed.utils.errors import explain

from .own_slice import ZeroParamStatus
from .utils import is_zero_param

# What torch raises for tensors of a wrong shape.
_KINDS = (RuntimeError, IndexError, ValueError, TypeError)
# Frames that are searched, from the one that raised outwards.
_FRAMES = 4
_NAMES_SHOWN = 5
_OWN = ("_parameters", "_modules", "_buffers", "_external_params")


def add_hint(error: BaseException | None) -> None:
    """Add to an error of a forward pass which parameters its frames hold that are not gathered, if there are any."""
    if error is None or type(error) not in _KINDS or getattr(error, "_ds_hinted", False):
        return
    # The innermost module's hook comes first; by the time of the outer ones' its parameters are released.
    error._ds_hinted = True  # type: ignore[attr-defined]
    found = list(dict.fromkeys(_missing(error.__traceback__)))
    if not found:
        return
    hint = (
        "ZeRO stage 3: used here while only a slice of it was there: "
        + ", ".join(found)
        + ". Parameters are gathered for the module that owns them, and where they are read as an attribute of a module;"
        " for any other use call deepspeed.zero.register_external_parameter(module, parameter) in the module's __init__,"
        " or use them inside deepspeed.zero.GatheredParameters."
    )
    error.args = (f"{error}\n{hint}",)


def _missing(trace: TracebackType | None) -> Iterator[str]:
    frames = [frame for frame, _ in traceback.walk_tb(trace)][-_FRAMES:]
    for frame in frames:
        for name, value in frame.f_locals.items():
            if isinstance(value, torch.nn.Module):
                for attribute, held in vars(value).items():
                    if attribute not in _OWN and not isinstance(held, torch.nn.Module):
                        yield from _released(f"{name}.{attribute}", held)
            else:
                yield from _released(name, value)


def _released(name: str, value: Any) -> Iterator[str]:
    """Names of the parameters in `value` that are not whole."""
    if isinstance(value, torch.Tensor):
        if is_zero_param(value) and value.ds_status is ZeroParamStatus.NOT_AVAILABLE:  # type: ignore[attr-defined]
            yield f"'{name}' of shape {tuple(value.ds_shape)}"  # type: ignore[attr-defined]
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value[:100]):
            if isinstance(item, torch.Tensor):
                yield from _released(f"{name}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in list(value.items())[:100]:
            if isinstance(item, torch.Tensor):
                yield from _released(f"{name}[{key!r}]", item)


def some_of(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are; empty where there are none."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join([*names[:_NAMES_SHOWN], *([f"{more} more"] if more > 0 else [])])


def unused_message(names: Sequence[str]) -> str:
    """What is wrong where every parameter is to have a gradient, and those of these names had none on this rank."""
    return explain(
        "parameters had no gradient, so the step was not taken and weights are as before",
        got=some_of(names) or "a parameter that another rank did not use",
        expected="a gradient for each, because ignore_unused_parameters is false",
        fix="set 'zero_optimization.ignore_unused_parameters' to true, or freeze what is not used",
    )
