# SPDX-License-Identifier: Apache-2.0
"""The product with a frozen weight that exists only while it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FrozenProduct(torch.autograd.Function):
    """`input @ weight.T` for a frozen weight that is made anew for each pass, and saved by neither."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Multiply; `make()` gives the weight `[output_dim, input_dim]`."""
        ctx.make = make
        return nn.functional.linear(input, make().to(input.device, input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Make the weight again."""
        return grad @ ctx.make().to(grad.device, grad.dtype), None
