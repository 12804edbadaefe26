# SPDX-License-Identifier: Apache-2.0
"""The public names for parameters that are sharded over ranks (ZeRO stage 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain

from .codec import CUDAQuantizer
from .gathered import GatheredParameters
from .init_context import (
    DeepSpeedTensorOverride,
    InitContext,
    restore_init_context,
    shutdown_init_context,
    single_rank_error,
)
from .linear import zero3_linear_wrap
from .own_slice import ZeroParamStatus, ZeroParamType
from .residency import register_external, unregister_external
from .sharded_param import get_allgather_dtype, release
from .utils import is_zero_param

__all__ = [
    "CUDAQuantizer",
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "InsertPostInitMethodToModuleSubClasses",
    "MultipleAllGatherHandles",
    "ZeroParamStatus",
    "ZeroParamType",
    "free_param",
    "get_accelerator",
    "get_allgather_dtype",
    "is_zero_param",
    "partitioned_param_data_shape",
    "register_external_parameter",
    "restore_init_context",
    "shutdown_init_context",
    "unregister_external_parameter",
    "zero3_linear_wrap",
    "zero_wrapper_for_fp_tensor_constructor",
]

# The shape of a parameter of which only the slice is here.
partitioned_param_data_shape = [0]

# The name that callers know.
InsertPostInitMethodToModuleSubClasses = InitContext
_contradicting_single_rank_pg_error = single_rank_error

# Other libraries compare these, and replace the wrapper below, before they enter `Init`.
_orig_torch_tensor = torch.tensor
_orig_torch_empty = torch.empty
_orig_torch_zeros = torch.zeros
_orig_torch_ones = torch.ones
_orig_torch_full = torch.full
_orig_torch_arange = torch.arange
_orig_torch_eye = torch.eye
_orig_torch_randn = torch.randn


def zero_wrapper_for_fp_tensor_constructor(
    fn: Any, target_fp_dtype: torch.dtype | None, target_device: Any = None
) -> Any:
    """A tensor constructor that makes floating tensors of a dtype, on a device, unless told otherwise.

    Args:
        fn: the constructor.
        target_fp_dtype: dtype of floating results; None leaves it.
        target_device: device where the caller names none.
    """

    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is None and target_device is not None:
            kwargs["device"] = target_device
        tensor = fn(*args, **kwargs)
        if target_fp_dtype is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(target_fp_dtype)
        return tensor

    return construct


class Init(InitContext):
    """Context in which modules are built with sharded parameters; see `InitContext` for its arguments."""

    def wrap_constructor(self, constructor: Any) -> Any:
        """The wrapper of this module, looked up now: other libraries replace it."""
        by_itself = self.overrides
        return zero_wrapper_for_fp_tensor_constructor(
            constructor,
            self.dtype if DeepSpeedTensorOverride.dtype in by_itself else None,
            target_device=self.device if DeepSpeedTensorOverride.device in by_itself else None,
        )

    def whole(self, params: list[torch.nn.Parameter]) -> GatheredParameters:
        """The first rank's edits of gathered parameters are kept."""
        return GatheredParameters(params, modifier_rank=0)


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Say that `module` uses `parameter` of another module in its forward pass.

    Raises:
        RuntimeError: if `parameter` is no parameter.
    """
    if not isinstance(parameter, torch.nn.Parameter):
        raise RuntimeError(
            explain(
                "Parameter is not a torch.nn.Parameter",
                got=type(parameter).__name__,
                expected="torch.nn.Parameter",
            )
        )
    if is_zero_param(parameter):
        register_external(module, parameter)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Take back `register_external_parameter`.

    Raises:
        RuntimeError: if it was not registered.
    """
    if is_zero_param(parameter) and not unregister_external(module, parameter):
        raise RuntimeError(
            explain("the parameter is not registered with this module", got=type(module).__name__)
        )


def free_param(param: torch.nn.Parameter) -> None:
    """Go back to the slice of a gathered parameter."""
    release([param])


class MultipleAllGatherHandles:
    """Several gathers under way, as one handle.

    Args:
        handles: what asynchronous gathers returned.
    """

    def __init__(self, handles: Iterable[Any]) -> None:
        self.handles = list(handles)

    def wait(self, handle_dependency: bool = True) -> None:
        """Wait for all of them."""
        for handle in self.handles:
            handle.wait(handle_dependency=handle_dependency)
