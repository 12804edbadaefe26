# SPDX-License-Identifier: Apache-2.0
"""How many operations one call of an operator costs, watched below autograd.

Products (linear, matmul, convolution, attention) count two flops for each multiply-accumulate. Convolutions add
their bias, norms five operations an element with weights and four without, activations, softmax and pooling one an
element. Plain arithmetic between tensors, losses, copies and look-ups count nothing: beside the products they are
noise, and the numbers stay comparable with those of other profilers.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Cost = tuple[int, int]  # flops, multiply-accumulates
Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], Cost]


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _product(left: int, right: int) -> Formula:
    """Matrix product of the args at these places: elements of the result times the inner dimension."""

    def cost(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
        macs = _first(out).numel() * args[left].shape[-1]
        return 2 * macs, macs

    return cost


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    x, weight, bias = args[0], args[1], args[2]
    transposed = bool(args[6])
    result = _first(out)
    # each output element of a convolution, each input element of a transposed one, meets one filter
    places = x if transposed else result
    macs = places.numel() // places.shape[1] * weight.shape[0] * prod(weight.shape[1:])
    if bias is None:
        return 2 * macs, macs
    return 2 * macs + result.numel(), macs


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    query, key, value = args[:3]
    *batch, rows, width = query.shape
    macs = prod(batch) * rows * key.shape[-2] * (width + value.shape[-1])
    return 2 * macs, macs


def _lstm(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    x, weights = args[0], args[1:3]
    macs = prod(x.shape[:-1]) * sum(weight.numel() for weight in weights)
    return 2 * macs, macs


def _per_output(operations: int) -> Formula:
    def cost(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
        return operations * _first(out).numel(), 0

    return cost


def _per_input(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    return args[0].numel(), 0


def _norm(weight_at: int) -> Formula:
    def cost(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
        weighted = len(args) > weight_at and args[weight_at] is not None
        return (5 if weighted else 4) * _first(out).numel(), 0

    return cost


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    weighted, training = args[1] is not None, bool(args[5])
    each = (5 if weighted else 4) if training else (2 if weighted else 1)
    return each * _first(out).numel(), 0


# operator of torch.ops.aten -> cost of a call
_TABLE: dict[str, Formula] = {
    "mm": _product(0, 1),
    "addmm": _product(1, 2),
    "bmm": _product(0, 1),
    "baddbmm": _product(1, 2),
    "mv": _product(0, 1),
    "addmv": _product(1, 2),
    "dot": _product(0, 1),
    "convolution": _convolution,
    "mkldnn_rnn_layer": _lstm,
    "native_layer_norm": _norm(2),
    "native_group_norm": _norm(1),
    "rms_norm": _norm(2),
    "_fused_rms_norm": _norm(2),
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
}
_TABLE |= dict.fromkeys(
    (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    _attention,
)
_TABLE |= dict.fromkeys(
    [
        "relu",
        "relu_",
        "threshold",
        "elu",
        "elu_",
        "leaky_relu",
        "leaky_relu_",
        "hardtanh",
        "hardtanh_",
        "gelu",
        "silu",
        "silu_",
        "mish",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "_softmax",
        "_prelu_kernel",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
    ],
    _per_output(1),
)
_TABLE |= dict.fromkeys(
    [
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
    ],
    _per_input,
)


class OperatorWatch(TorchDispatchMode):
    """While entered, tells the cost of each operator that runs.

    Args:
        report: called with flops and multiply-accumulates of each call that costs any.
    """

    def __init__(self, report: Callable[[int, int], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        formula = _TABLE.get(func.overloadpacket.__name__)
        if formula is None and func.namespace == "aten":
            # without autograd (inference mode) a composite operator arrives whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.report(*formula(args, kwargs, out))
        return out
