# SPDX-License-Identifier: Apache-2.0
"""A linear layer cut into tiles: under ZeRO-3 only one tile's weight is whole at a time, not the layer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.runtime.utils import partition_uniform
from deepspeed.utils.errors import explain

from .partition_parameters import GatheredParameters


class TiledLinear(nn.Module):
    """`linear_cls(in_features, out_features)` as a grid of smaller layers.

    `linears[out][in]` is the tile of one slice of outputs and one slice of inputs; the tile of the last input slice
    holds the bias. The first slices are one longer where the sizes do not divide.

    Args:
        in_features, out_features, bias: of the whole layer.
        in_splits, out_splits: number of slices, from 1 to the number of features.
        input_is_already_split: `forward` is given the list of input slices.
        combine_out_splits: `forward` gives one tensor; False: the list of output slices.
        linear_cls: what makes a tile, called as `linear_cls(in, out, bias=..., **kwargs)`.
        init_linear: layer whose weights are copied in.

    Raises:
        RuntimeError: a number of slices that is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _check_splits("in", in_splits, in_features)
        _check_splits("out", out_splits, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.use_bias = bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = partition_uniform(in_features, in_splits)
        self.out_parts = partition_uniform(out_features, out_splits)
        last = in_splits - 1
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(cols, rows, bias=bias and place == last, **kwargs)
                for place, cols in enumerate(_sizes(self.in_parts))
            )
            for rows in _sizes(self.out_parts)
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_: Tensor | Sequence[Tensor]) -> Any:
        """Apply the layer.

        Args:
            input_: `[..., in_features]`, or its slices along the last dimension.

        Returns:
            `[..., out_features]`, or the list of its slices.

        Raises:
            AssertionError: the number of given slices is another.
        """
        slices = self._slices(input_)
        outputs = []
        for row in self.linears:
            total: Any = None
            for tile, values in zip(row, slices, strict=True):
                total = self._add(tile(values), total)
            outputs.append(total)
        return self._combine(outputs) if self.combine_out_splits else outputs

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take the weight and bias of a whole layer, tile by tile; sharded ones are gathered. All ranks call it.

        Raises:
            AssertionError: the other layer has another shape, or only one of the two has a bias.
        """
        bias = getattr(other, "bias", None)
        if (bias is not None) != self.use_bias:
            raise AssertionError(
                explain(
                    "both layers need a bias, or neither",
                    got=f"bias={self.use_bias} here, {bias is not None} there",
                )
            )
        shape = tuple(getattr(other.weight, "ds_shape", other.weight.shape))
        if shape != (self.out_features, self.in_features):
            raise AssertionError(
                explain(
                    "the layer to copy from has another shape",
                    got=shape,
                    expected=(self.out_features, self.in_features),
                )
            )
        whole = [other.weight] if bias is None else [other.weight, bias]
        with GatheredParameters(whole):
            for row, tiles in enumerate(self.linears):
                rows = slice(self.out_parts[row], self.out_parts[row + 1])
                for col, tile in enumerate(tiles):
                    cols = slice(self.in_parts[col], self.in_parts[col + 1])
                    with GatheredParameters(list(tile.parameters()), modifier_rank=0):
                        tile.weight.copy_(other.weight[rows, cols])
                        if tile.bias is not None:
                            tile.bias.copy_(bias[rows])

    def _slices(self, given: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        if not self.input_is_already_split and torch.is_tensor(given):
            return torch.split(given, _sizes(self.in_parts), dim=-1)
        if torch.is_tensor(given) or len(given) != self.in_splits:
            raise AssertionError(
                explain(
                    f"Col splits {self.in_splits} does not match input splits "
                    f"{1 if torch.is_tensor(given) else len(given)}",
                    fix="Give one slice of the input for each of in_splits, along the last dimension.",
                )
            )
        return given

    def _add(self, result: Any, total: Any) -> Any:
        return result if total is None else total + result

    def _combine(self, outputs: Sequence[Any]) -> Any:
        return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=-1)


class TiledLinearReturnBias(TiledLinear):
    """`TiledLinear` of layers that return `(output, bias)` and leave the addition to the caller."""

    def _add(self, result: Any, total: Any) -> Any:
        output, bias = result
        if total is None:
            return output, bias
        before, earlier_bias = total
        return before + output, bias if earlier_bias is None else earlier_bias

    def _combine(self, outputs: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        biases = [bias for _, bias in outputs]
        whole = super()._combine([output for output, _ in outputs])
        return whole, None if biases[0] is None else super()._combine(biases)


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _check_splits(which: str, splits: int, features: int) -> None:
    if not 1 <= splits <= features:
        raise RuntimeError(
            explain(
                f"{which} splits must be in range [1, {which}_features]",
                got=splits,
                expected=f"1 to {features}",
            )
        )
