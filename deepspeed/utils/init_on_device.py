# SPDX-License-Identifier: Apache-2.0
"""Build a model on a device, in a dtype, without editing its code."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CONSTRUCTORS: frozenset[Any] = frozenset(
    getattr(torch, name)
    for name in (
        "arange",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randn",
        "scalar_tensor",
        "tensor",
        "zeros",
    )
)


class _Constructors(TorchFunctionMode):
    """Redirects torch's factory functions; floating results get the dtype, whatever was asked."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func not in _CONSTRUCTORS:
            return func(*args, **keywords)
        if keywords.get("device") is None:
            keywords["device"] = self.device
        made = func(*args, **keywords)
        if made.is_floating_point() and made.dtype != self.dtype:
            made = made.to(self.dtype).requires_grad_(made.requires_grad)
        return made


class OnDevice:
    """Context: tensors that are made in it live on ``device``, floating ones in ``dtype``.

    Args:
        dtype: of floating-point tensors.
        device: "meta" makes shapes without memory.
        enabled: False makes the context do nothing.

    Example:
        >>> with OnDevice(dtype=torch.float16, device="meta"):
        ...     model = torch.nn.Linear(4, 4)
        >>> model.weight.device.type, model.weight.dtype
        ('meta', torch.float16)
    """

    def __init__(
        self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.enabled = enabled
        self._mode: _Constructors | None = None

    def __enter__(self) -> None:
        if not self.enabled:
            return
        dtype, device = self.dtype, self.device
        if device.type == "meta":
            # torch imports it to initialise meta tensors, and it must see the true constructor
            importlib.import_module("torch._dynamo")
        self._mode = _Constructors(dtype, device)
        self._mode.__enter__()

        def new(cls: type, *args: Any, **kwargs: Any) -> torch.Tensor:
            # the old constructor torch.Tensor(2, 3), which no function mode sees
            plain: torch.Tensor = torch._C.TensorBase.__new__(cls, *args, **kwargs)
            return plain.to(device=device, dtype=dtype if plain.is_floating_point() else None)

        torch.Tensor.__new__ = new  # type: ignore[assignment]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._mode is not None:
            del torch.Tensor.__new__  # what TensorBase has shows again
            self._mode.__exit__(kind, error, trace)
            self._mode = None
