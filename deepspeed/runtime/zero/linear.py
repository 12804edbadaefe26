# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose backward pass reads its weight from the parameter itself, for callers that ask for it by name.

Stage 3 needs none of it: residency.py keeps what autograd saves of gathered weights short for every kind of layer, so
`torch.nn.functional.linear` stays as it is. With a weight that is saved as the parameter, the same holds wherever
saved tensors are nobody's to watch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from deepspeed.accelerator import get_accelerator


def __getattr__(name: str) -> Any:
    """`autocast_custom_fwd` and `autocast_custom_bwd`: of torch, for the accelerator, which no import chooses."""
    from deepspeed.runtime.utils import noop_decorator

    if name == "noop_decorator":
        return noop_decorator
    if name not in ("autocast_custom_fwd", "autocast_custom_bwd"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind, decorator = get_accelerator().device_name(), name.removeprefix("autocast_")
    if hasattr(torch.amp, decorator):
        return partial(getattr(torch.amp, decorator), device_type=kind)
    # torch before 2.4
    return getattr(getattr(getattr(torch, kind, None), "amp", None), decorator, noop_decorator)


class LinearFunctionForZeroStage3(torch.autograd.Function):
    """`input @ weight.T + bias`; `apply(input, weight, bias)` works under `torch.func` too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product, in autocast's dtype where that is on."""
        return functional.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Save the operands: a parameter is saved as itself, so its values may go and come back meanwhile."""
        ctx.save_for_backward(*inputs)
        ctx._dtype = output.dtype
        ctx._fwd_used_autocast = any(t is not None and t.dtype != output.dtype for t in inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """The gradients, computed in the product's dtype, whatever autocast is on by now."""
        input, weight, bias = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            rows = grad.to(ctx._dtype).reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                of_input = (rows @ weight.to(ctx._dtype)).view(input.shape).to(input.dtype)
            if ctx.needs_input_grad[1]:
                seen = input.to(ctx._dtype).reshape(-1, input.shape[-1])
                of_weight = (rows.t() @ seen).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = rows.sum(0).to(bias.dtype)
        return of_input, of_weight, of_bias


def zero3_linear_wrap(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` by `LinearFunctionForZeroStage3`."""
    return LinearFunctionForZeroStage3.apply(input, weight, bias)


class LinearModuleForZeroStage3(torch.nn.Linear):
    """`torch.nn.Linear` by `LinearFunctionForZeroStage3`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (*, in_features) to (*, out_features)."""
        return zero3_linear_wrap(input, self.weight, self.bias)
