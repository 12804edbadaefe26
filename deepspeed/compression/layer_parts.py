# SPDX-License-Identifier: Apache-2.0
"""What compressed layers have in common: weights and inputs of fewer bits, and masks that prune."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deepspeed.runtime.zero.gathered import GatheredParameters
from deepspeed.runtime.zero.own_slice import is_zero_param, shape_of
from deepspeed.utils.errors import explain

from .utils import AsymQuantizer, BinaryQuantizer, SymQuantizer, TernaryQuantizer, TopKBinarizer


def whole(
    params: Iterable[nn.Parameter], edited: bool = False
) -> contextlib.AbstractContextManager:
    """A region in which those of the params that ZeRO has sharded are whole; edits are kept if `edited`."""
    sharded = [param for param in params if is_zero_param(param)]
    if not sharded:
        return contextlib.nullcontext()
    return GatheredParameters(sharded, modifier_rank=0 if edited else None)


def by_type(kind: str) -> Callable[..., Tensor]:
    """The function that rounds `symmetric`ally or `asymmetric`ally.

    Raises:
        NotImplementedError: there is no such type.
    """
    if kind not in ("symmetric", "asymmetric"):
        raise NotImplementedError(
            explain("unknown quantization_type", got=kind, expected="symmetric or asymmetric")
        )
    return SymQuantizer.apply if kind == "symmetric" else AsymQuantizer.apply


class QuantAct(nn.Module):
    """Rounds activations within a range that is learned in training: a running mean of the least and greatest values.

    Args:
        act_range_momentum: what the range so far weighs against that of a batch.
        quant_mode: ``symmetric`` or ``asymmetric``.

    The buffer `x_min_max` holds the range. Until the first batch in training, each batch's own range counts.
    """

    x_min_max: Tensor

    def __init__(self, act_range_momentum: float = 0.95, quant_mode: str = "symmetric") -> None:
        super().__init__()
        self.act_range_momentum, self.quant_mode = act_range_momentum, quant_mode
        self.act_function = by_type(quant_mode)
        self.register_buffer("x_min_max", torch.zeros(2))

    def forward(self, x: Tensor, num_bits: int, *_: Any) -> Tensor:
        """Return `x` rounded to `num_bits` bits."""
        span = torch.stack([x.detach().amin(), x.detach().amax()]).to(self.x_min_max)
        known = self.x_min_max[0] != self.x_min_max[1]
        if self.training:
            mean = torch.lerp(span, self.x_min_max, self.act_range_momentum)
            self.x_min_max.copy_(torch.where(known, mean, span))
        low, high = torch.where(known, self.x_min_max, span)
        return self.act_function(x, num_bits, low, high, 1)


class Compressed(nn.Module):
    """What a layer can have done to it; nothing until a technique is prepared by `enable_...` and switched on.

    For each technique there is a flag `<technique>_enabled`, which the schedule sets.
    """

    weight: Any

    @classmethod
    def adopt(cls, module: nn.Module) -> Any:
        """Make a plain layer one of this class, in place: weights, hooks and names stay."""
        module.__class__ = cls
        module._prepare()  # type: ignore[operator]
        return module

    def _prepare(self) -> None:
        """Set the flags of a layer to which nothing is done."""

    def _bits_of_weight(self) -> int | None:
        return self.weight.target_bits if hasattr(self.weight, "target_bits") else None


class QuantizedWeight(Compressed):
    """A weight of fewer bits: in the forward pass, or by the engine after each step."""

    def _prepare(self) -> None:
        super()._prepare()
        self.weight_quantization_enabled_in_forward = False
        self.weight_quantization_enabled = False

    def enable_weight_quantization(
        self,
        start_bits: int,
        target_bits: int,
        quantization_period: int,
        weight_quantization_enabled_in_forward: bool,
        quantization_type: str,
        num_groups: int,
    ) -> None:
        """Prepare it.

        Args:
            start_bits: of the engine's quantization, at its first step.
            target_bits: of the forward pass from the start, and what the engine's quantization comes to.
            quantization_period: steps to the engine's first change of bits; each next takes as many as went before.
            weight_quantization_enabled_in_forward: round in the forward pass, so that no fp16 is needed.
            quantization_type: ``symmetric`` or ``asymmetric``; 1 and 2 bits are symmetric.
            num_groups: runs of values with a scale of their own.

        Raises:
            AssertionError: 1 or 2 bits and not symmetric.
        """
        self.weight.start_bits = start_bits
        self.weight.target_bits = target_bits
        self.weight.q_period = quantization_period
        self.weight_quantization_enabled_in_forward = weight_quantization_enabled_in_forward
        quantizer = by_type(quantization_type)
        if not weight_quantization_enabled_in_forward:
            return
        few: dict[int, Any] = {1: BinaryQuantizer.apply, 2: TernaryQuantizer.apply}
        if target_bits in few and quantization_type != "symmetric":
            raise AssertionError(
                f"Only symmetric quantization is supported for {target_bits} bit(s) a weight: "
                "set quantization_type to symmetric."
            )
        if math.prod(shape_of(self.weight)) % num_groups:
            raise ValueError(
                explain(
                    "quantize_groups does not divide a weight",
                    got=f"{num_groups} for shape {tuple(shape_of(self.weight))}",
                    expected="a divisor of its number of values",
                )
            )
        self.weight_quantizer: Callable[..., Tensor] = few.get(target_bits, quantizer)
        self.weight_quantize_num_groups = num_groups

    def fix_weight_quantization(self) -> None:
        """Round the weight for good."""
        if self.weight_quantization_enabled_in_forward:
            with torch.no_grad():
                self.weight.data.copy_(self._rounded())
        self.weight_quantization_enabled_in_forward = self.weight_quantization_enabled = False

    def _rounded(self) -> Tensor:
        bits, groups = self._bits_of_weight(), self.weight_quantize_num_groups
        return self.weight_quantizer(self.weight, bits, None, None, groups)

    def _weight_now(self) -> Tensor:
        on = self.weight_quantization_enabled_in_forward and self.weight_quantization_enabled
        return self._rounded() if on else self.weight


class QuantizedInput(Compressed):
    """Inputs of fewer bits."""

    def _prepare(self) -> None:
        super()._prepare()
        self.activation_quantization_method: str | None = None
        self.activation_quantization_enabled = False

    def enable_activation_quantization(
        self, bits: int, quantization_type: str, range_calibration: str
    ) -> None:
        """Prepare it.

        Args:
            bits: of the inputs.
            quantization_type: ``symmetric`` or ``asymmetric``.
            range_calibration: ``static`` is a range learned in training, `QuantAct`; ``dynamic`` is that of each
                token (each sample, before a convolution).

        Raises:
            AssertionError: fewer than 3 bits.
            NotImplementedError: there is no such calibration.
        """
        if bits not in range(3, 9):
            raise AssertionError("Only 3-8 bits activation quantization are supported")
        if range_calibration not in ("static", "dynamic"):
            raise NotImplementedError(
                explain(
                    "unknown range_calibration", got=range_calibration, expected="static or dynamic"
                )
            )
        self.activation_quantization_bits = bits
        self.activation_quantization_method = f"{quantization_type}_{range_calibration}"
        if range_calibration == "static":
            learned = QuantAct(quant_mode=quantization_type)
            self.activation_quantizer: Any = learned.to(self.weight.device)
        else:
            self.activation_quantizer = by_type(quantization_type)

    def _input_now(self, x: Tensor, groups: int) -> Tensor:
        if not self.activation_quantization_enabled:
            return x
        bits, quantizer = self.activation_quantization_bits, self.activation_quantizer
        if isinstance(quantizer, QuantAct):
            return quantizer(x, bits)
        return quantizer(x, bits, None, None, groups)


class Pruned(Compressed):
    """Masks over the weight, by kind. ``l1`` keeps the greatest magnitudes of the weight as it is when the mask is made;
    ``topk`` learns a score for each thing that may go, and keeps the best."""

    # kind -> (the name of its scores, that of its mask)
    masks: ClassVar[dict[str, tuple[str, str]]] = {}
    sparse_pruning_method: str | None

    def _prepare(self) -> None:
        super()._prepare()
        for kind in self.masks:
            setattr(self, f"{kind}_pruning_method", None)
            setattr(self, f"{kind}_pruning_enabled", False)

    def enable_sparse_pruning(self, ratio: float, method: str) -> None:
        """Prepare to keep a share `ratio` of all weights."""
        self._enable_pruning("sparse", ratio, method, tuple(shape_of(self.weight)), lambda w: w)

    def _enable_pruning(
        self,
        kind: str,
        ratio: float,
        method: str,
        shape: tuple[int, ...],
        size: Callable[[Tensor], Tensor] | None,
    ) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(
                explain(
                    f"unusable dense_ratio of {kind}_pruning",
                    got=ratio,
                    expected="the share that stays, above 0 and at most 1",
                )
            )
        scores, mask = self.masks[kind]
        setattr(self, f"{kind}_pruning_ratio", ratio)
        setattr(self, f"{kind}_pruning_method", method)
        weight = self.weight
        if method == "topk":
            # in the weight's dtype, which the engine casts with the others
            values = torch.empty(shape, device=weight.device, dtype=weight.dtype)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            self.register_parameter(scores, nn.Parameter(values))
            self.register_buffer(mask, None)
        elif method == "l1" and size is not None:
            with torch.no_grad(), whole([weight]):
                kept = TopKBinarizer.apply(size(weight.data.abs().float()), ratio, False)
            self.register_buffer(mask, kept.view(shape))
        else:
            known = "topk" if size is None else "l1 or topk"
            raise NotImplementedError(
                explain(f"unknown method of {kind}_pruning", got=method, expected=known)
            )

    def _mask_of(self, kind: str) -> Tensor:
        if kind not in self.masks or getattr(self, f"{kind}_pruning_method") is None:
            raise NotImplementedError(f"there is no {kind}_pruning of this layer to take a mask of")
        scores, mask = self.masks[kind]
        if getattr(self, f"{kind}_pruning_method") != "topk":
            return getattr(self, mask)
        ratio = getattr(self, f"{kind}_pruning_ratio")
        return TopKBinarizer.apply(getattr(self, scores), ratio, False)

    def _end_pruning(self, kind: str) -> None:
        scores, mask = self.masks[kind]
        for name in (scores, mask):
            if hasattr(self, name):
                delattr(self, name)
        setattr(self, f"{kind}_pruning_method", None)
        setattr(self, f"{kind}_pruning_enabled", False)

    def fix_sparse_pruning_helper(self) -> None:
        """Set what the mask prunes to zero for good."""
        self.weight.data.mul_(self._mask_of("sparse").to(self.weight.dtype))
        self._end_pruning("sparse")

    def _cut(self, dim: int, kept: Tensor, smaller: bool) -> None:
        """Remove the slices of the weight that are not kept, or set them to zero; those of the bias with the first."""
        names = ("weight", "bias") if dim == 0 else ("weight",)
        for name in names:
            param = getattr(self, name)
            if param is None:
                continue
            if smaller:
                rest = param.data.index_select(dim, kept.nonzero().flatten())
                setattr(self, name, nn.Parameter(rest, requires_grad=param.requires_grad))
            else:
                shape = [-1 if d == dim else 1 for d in range(param.dim())]
                param.data.mul_(kept.view(shape).to(param.dtype))
