# SPDX-License-Identifier: Apache-2.0
"""The names that a checkpoint's pickle may use, each of which only makes data, and what they may be called with."""

from __future__ import annotations

import argparse
import collections
import datetime
import pickle
import types
from typing import Any

import torch


class Record:
    """Stands for an object of a class that older checkpoints pickled: its attributes and nothing else."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"


class ScalerRecord(Record):
    """A pickled loss scaler."""


class FragmentRecord(Record):
    """A pickled `fragment_address`: attributes `numel` and `start`."""


class Refused(pickle.UnpicklingError):
    """The pickle asks for more than data."""


def _bytearray(*args: Any) -> bytearray:
    """`bytearray` of given bytes; refuses the form that allocates a size named in the file."""
    if args and isinstance(args[0], int):
        raise Refused("bytearray of a declared size")
    return bytearray(*args)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What `_codecs.encode` does for the one encoding that pickled bytes use."""
    if encoding != "latin1":
        raise Refused(f"encoding {encoding!r}")
    return text.encode("latin1")


def _rebuild_from_type(
    function: Any, kind: Any, arguments: tuple[Any, ...], state: Any
) -> torch.Tensor:
    """A tensor that had attributes of its own: the tensor without them."""
    if function not in _rebuild_functions():
        raise Refused(f"a tensor made by {function!r}")
    return function(*arguments)


def _rebuild_parameter(data: torch.Tensor, wants_grad: bool, hooks: Any, state: Any) -> Any:
    """A parameter that had attributes of its own: the parameter without them."""
    return torch._utils._rebuild_parameter(data, wants_grad, hooks)  # type: ignore[no-untyped-call]


def _rebuild_functions() -> tuple[Any, ...]:
    names = (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_sparse_tensor",
    )
    return tuple(getattr(torch._utils, name) for name in names if hasattr(torch._utils, name))


def harmless() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): collections.defaultdict,
        ("collections", "deque"): collections.deque,
        ("collections", "Counter"): collections.Counter,
        ("argparse", "Namespace"): argparse.Namespace,
        ("types", "SimpleNamespace"): types.SimpleNamespace,
        ("datetime", "datetime"): datetime.datetime,
        ("datetime", "date"): datetime.date,
        ("datetime", "timedelta"): datetime.timedelta,
        ("_codecs", "encode"): _encode,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch", "Tensor"): torch.Tensor,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"): ScalerRecord,
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"): ScalerRecord,
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
        ("deepspeed.utils.tensor_fragment", "fragment_address"): FragmentRecord,
        ("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"): Record,
    }
    for module in ("builtins", "__builtin__"):
        for kind in (
            set,
            frozenset,
            complex,
            list,
            dict,
            tuple,
            int,
            float,
            bool,
            str,
            slice,
            range,
        ):
            table[module, kind.__name__] = kind
        table[module, "bytearray"] = _bytearray
    table |= {("torch._utils", function.__name__): function for function in _rebuild_functions()}
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype) or (name.endswith("Storage") and isinstance(value, type)):
            table["torch", name] = value
    table["torch.storage", "UntypedStorage"] = torch.storage.UntypedStorage
    table["torch.storage", "TypedStorage"] = torch.storage.TypedStorage
    return table | _numpy_names()


def _numpy_names() -> dict[tuple[str, str], Any]:
    import numpy

    core = numpy._core if int(numpy.__version__.split(".")[0]) > 1 else numpy.core
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): numpy.ndarray,
        ("numpy", "dtype"): numpy.dtype,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        for name in ("_reconstruct", "scalar"):
            table[module, name] = getattr(core.multiarray, name)
    return table


def check_call(function: Any, arguments: Any) -> None:
    """Refuse to make a container of something whose size is only declared: a range, an array that was never filled.

    Raises:
        Refused: it is that.
    """
    if not any(function is kind for kind in _FILLED):
        return
    for item in arguments if isinstance(arguments, tuple) else ():
        if item is not None and not isinstance(item, _GIVEN):
            raise Refused(f"a {function.__name__} of a {type(item).__name__}")


_PLAIN = (list, tuple, set, frozenset, dict, collections.deque)
_FILLED = (
    *_PLAIN,
    collections.Counter,
    collections.OrderedDict,
    collections.defaultdict,
    torch.Size,
    _bytearray,
)
_GIVEN = (*_PLAIN, str, bytes, bytearray, int, float, type)
