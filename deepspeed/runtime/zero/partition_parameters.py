# SPDX-License-Identifier: Apache-2.0
"""The public names for parameters that are sharded over ranks (ZeRO stage 3)."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.utils.errors import explain

from .init_context import (
    DeepSpeedTensorOverride,
    InitContext,
    restore_init_context,
    shutdown_init_context,
)
from .residency import register_external, unregister_external
from .sharded_param import (
    ZeroParamStatus,
    ZeroParamType,
    finish_gather,
    gather,
    release,
    write_back,
)
from .utils import is_zero_param

__all__ = [
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "ZeroParamType",
    "free_param",
    "get_accelerator",
    "is_zero_param",
    "register_external_parameter",
    "restore_init_context",
    "shutdown_init_context",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

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


class GatheredParameters:
    """Context in which sharded parameters are whole; whole ones are left as they are.

    Args:
        params: a parameter, or an iterable of tensors.
        modifier_rank: rank in the parameters' group whose edits are kept on all ranks; None where nothing is edited.
        fwd_module: module to which the parameters are registered as external.
        enabled: False makes it do nothing.

    Raises:
        RuntimeError: on entering it inside another one on the same parameters, if either of the two edits them; on
            leaving it after edits without `modifier_rank`, where `enable_sanity_checks` is on.
    """

    def __init__(
        self,
        params: torch.Tensor | Iterable[torch.Tensor],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, torch.Tensor) else list(params)
        self.params = list(dict.fromkeys(p for p in given if is_zero_param(p)))
        self.enabled = enabled and bool(self.params)
        self.modifier_rank = modifier_rank
        self._gathered: list[Any] = []
        self._versions: list[int] = []
        if self.enabled and fwd_module is not None:
            for param in self.params:
                register_external(fwd_module, param)

    def __enter__(self) -> None:
        if not self.enabled:
            return
        for param in self.params:
            _refuse_overlap(param, self.modifier_rank is not None)
        self._gathered = [p for p in self.params if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        gather(self._gathered)
        finish_gather(self.params)
        for param in self.params:
            param.ds_open_gathers = [
                *getattr(param, "ds_open_gathers", []),
                self.modifier_rank is not None,
            ]
        self._versions = [p._version for p in self.params]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.enabled:
            return
        for param in self.params:
            param.ds_open_gathers = param.ds_open_gathers[:-1]
        try:
            if kind is None:
                self._keep_edits()
        finally:
            release(
                p for p in self._gathered if not p.ds_active_sub_modules and not p.ds_open_gathers
            )

    def _keep_edits(self) -> None:
        if self.modifier_rank is None:
            for param, version in zip(self.params, self._versions, strict=True):
                if param.ds_enable_sanity_checks and param._version != version:
                    raise RuntimeError(
                        explain(
                            "a gathered parameter was edited, and the edit would be lost",
                            got=f"an in-place change of a parameter of shape {tuple(param.ds_shape)}, modifier_rank=None",
                            expected="modifier_rank= with the rank whose edit counts",
                            fix="pass modifier_rank=0 to GatheredParameters",
                        )
                    )
            return
        for param in self.params:
            flat.broadcast_(param.data, param.ds_home, src=self.modifier_rank)
            write_back(param)
            refresh = getattr(param, "_refresh_master", None)
            if refresh is not None:
                refresh()


def _refuse_overlap(param: Any, edits: bool) -> None:
    opened = getattr(param, "ds_open_gathers", [])
    if opened and (edits or any(opened)):
        raise RuntimeError(
            explain(
                "a parameter is gathered for editing while another GatheredParameters has it open",
                got=f"two overlapping contexts on a parameter of shape {tuple(param.ds_shape)}",
                expected="one of them at a time, unless both only read",
                fix="leave the outer context before you enter the one with modifier_rank",
            )
        )


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
