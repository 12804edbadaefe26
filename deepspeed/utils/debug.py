# SPDX-License-Identifier: Apache-2.0
"""Names of modules and params for messages, and prints that ranks do not tear apart."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch

from .logging import get_dist_msg


class WeakIdNameMap:
    """Names of objects, by identity, that do not keep the objects alive."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref, str]] = {}

    def __setitem__(self, obj: Any, name: str) -> None:
        key = id(obj)
        self._names[key] = (weakref.ref(obj, lambda _: self._names.pop(key, None)), name)

    def __getitem__(self, obj: Any) -> str:
        return self._names[id(obj)][1]

    def __contains__(self, obj: Any) -> bool:
        return id(obj) in self._names

    def __len__(self) -> int:
        return len(self._names)

    def get(self, obj: Any, default: str) -> str:
        """Return the object's name, or ``default``."""
        return self._names.get(id(obj), (None, default))[1]

    def clear(self) -> None:
        """Forget all names."""
        self._names.clear()


module_names = WeakIdNameMap()
param_names = WeakIdNameMap()


def debug_clear_module_and_param_names() -> None:
    """Forget the names of modules and params."""
    module_names.clear()
    param_names.clear()


def debug_extract_module_and_param_names(model: torch.nn.Module) -> None:
    """Remember the names of a model's modules and params."""
    for name, module in model.named_modules():
        module_names[module] = name
    for name, param in model.named_parameters():
        param_names[param] = name


def _of(names: WeakIdNameMap, obj: Any) -> str:
    return names.get(obj, "unknown")


def debug_module2name(module: torch.nn.Module) -> str:
    """Return the module's remembered name, or "unknown"."""
    return _of(module_names, module)


def debug_module2name_id(module: torch.nn.Module) -> str:
    """Return the module's name and id."""
    return f"name={debug_module2name(module)} id={getattr(module, 'ds_id', None)}"


def debug_module2name_class(module: torch.nn.Module) -> str:
    """Return the module's name and class."""
    return f"name={debug_module2name(module)} {type(module).__name__}"


def debug_param2name(param: torch.Tensor) -> str:
    """Return the param's remembered name, or "unknown"."""
    return _of(param_names, param)


def ds_id(param: torch.Tensor) -> Any:
    """Return the id that sharding gave the param, or its Python id."""
    return getattr(param, "ds_id", id(param))


def ds_shape(param: torch.Tensor) -> Any:
    """Return the param's full shape, whether it is sharded or not."""
    return getattr(param, "ds_shape", param.shape)


def debug_param2name_id(param: torch.Tensor) -> str:
    """Return the param's name and id."""
    return f"name={debug_param2name(param)} id={ds_id(param)}"


def debug_param2name_id_shape(param: torch.Tensor) -> str:
    """Return the param's name, id and shape."""
    return f"{debug_param2name_id(param)} shape={tuple(ds_shape(param))}"


def debug_param2name_id_shape_device(param: torch.Tensor) -> str:
    """Return the param's name, id, shape and device."""
    return f"{debug_param2name_id_shape(param)} device={param.device}"


def debug_param2name_id_numel(param: torch.Tensor) -> str:
    """Return the param's name, id and number of elements."""
    return f"{debug_param2name_id(param)} numel={getattr(param, 'ds_numel', param.numel())}"


def debug_param2name_id_shape_status(param: torch.Tensor) -> str:
    """Return the param's name, id, shape and sharding status."""
    return f"{debug_param2name_id_shape(param)} status={getattr(param, 'ds_status', None)}"


def printflock(*msgs: object) -> None:
    """Print in one write: lines of several processes do not mix within."""
    sys.stdout.write(" ".join(map(str, msgs)) + "\n")
    sys.stdout.flush()


def print_rank(*msg: object, force: bool = False) -> None:
    """Print with the rank in front, when ``force`` is set."""
    if force:
        printflock(get_dist_msg(" ".join(map(str, msg)), [-1]))


def print_rank0(*msg: object, force: bool = False) -> None:
    """Print on rank 0 only, when ``force`` is set."""
    text = get_dist_msg(" ".join(map(str, msg)), [0])
    if force and text is not None:
        printflock(text)


def log_rank_file(rank: int, *msgs: object) -> None:
    """Append lines to ``debug_rank<rank>.txt`` in the working directory."""
    with open(f"debug_rank{rank}.txt", "a", encoding="utf-8") as file:
        file.writelines(f"{msg}\n" for msg in msgs)


def print_backward_tensors(tensor: torch.Tensor) -> None:
    """Print the leaf tensors that the tensor's backward would reach."""

    def walk(node: Any) -> None:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            printflock(f"tensor {debug_param2name(leaf)} shape={tuple(leaf.shape)}")
        for parent, _ in node.next_functions:
            if parent is not None:
                walk(parent)

    if tensor.grad_fn is not None:
        walk(tensor.grad_fn)
