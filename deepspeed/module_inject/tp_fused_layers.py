# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel layers whose weight holds several side by side, such as query, key and value: each is cut by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deepspeed.utils.errors import explain

from .tp_cut import sub_param_sizes
from .tp_layer import LinearAllreduce, LinearLayer, TensorParallelLayer, _whole_shape


class _ByShape(TensorParallelLayer):
    """A layer whose joined weights a rule's shape tells apart.

    Args:
        module, mp_group, skip_partition, name: as in `TensorParallelLayer`.
        shape: at `partition_dim` the number of equal weights, or the tuple of their sizes.
        partition_dim: the divided dimension.
        options: of the layer without joined weights.
    """

    shape: tuple[Any, ...]
    _joined: tuple[int, ...]

    def __init__(
        self,
        module: nn.Module,
        mp_group: Any = None,
        skip_partition: bool = False,
        *,
        shape: Sequence[Any],
        partition_dim: int | None = None,
        **options: Any,
    ) -> None:
        if partition_dim is None:
            partition_dim = type(self).partition_dim
        weight: Any = module.weight
        total = _whole_shape(weight)[partition_dim]
        # plain attributes, which modules allow before their constructor has run
        object.__setattr__(self, "partition_dim", partition_dim)
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "_joined", sub_param_sizes(tuple(shape), partition_dim, total))
        super().__init__(module, mp_group, skip_partition, **options)

    def _joined_sizes(self, total: int) -> tuple[int, ...]:
        return self._joined

    def _rule_shape(self, is_bias: bool) -> tuple[Any, ...]:
        return (self.shape[self.partition_dim],) if is_bias else self.shape


class SubParamLinearLayer(_ByShape, LinearLayer):
    """`LinearLayer` of joined weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map inputs to this rank's outputs of each joined weight, side by side."""
        if self.partition_dim != 0:
            return functional.linear(input, self.weight, self.bias)
        return super().forward(input)


class SubParamLinearAllreduce(_ByShape, LinearAllreduce):
    """`LinearAllreduce` of joined weights."""


class GateUpPack_LinearLayer(LinearLayer):
    """A column layer that holds an MLP's gate and its partner."""

    def _joined_sizes(self, total: int) -> tuple[int, ...]:
        return sub_param_sizes((2,), 0, total)


_SCRAMBLED = "its layout interleaves or replicates blocks of heads over the ranks"
_QWEN = "QWenBlock"
# Blocks whose one weight is query, key and value one after another, all of one size.
_THREE_PARTS = (_QWEN, "MPTBlock", "MptBlock", "GLMBlock", "BaichuanLayer")
# Blocks whose one weight is, head by head, query, key and value.
_BY_HEADS = ("BloomBlock",)


class fused_LinearLayer(LinearLayer):
    """A column layer that holds query, key and value in the way of a known block.

    Args:
        module, mp_group, skip_partition, name: as in `TensorParallelLayer`.
        fused_module: the block that the layer is in; its class tells how the three lie in the weight.
    """

    _in_three: bool
    _block: Any

    def __init__(
        self,
        module: nn.Module,
        mp_group: Any = None,
        skip_partition: bool = False,
        *,
        name: str | None = None,
        fused_module: Any = None,
    ) -> None:
        kind = type(fused_module).__name__
        object.__setattr__(self, "_in_three", any(known in kind for known in _THREE_PARTS))
        object.__setattr__(self, "_block", fused_module if _QWEN in kind else None)
        if not (self._in_three or any(known in kind for known in _BY_HEADS)):
            object.__setattr__(self, "unsupported_reason", f"{kind}: {_SCRAMBLED}")
        super().__init__(module, mp_group, skip_partition, name=name)

    def _joined_sizes(self, total: int) -> tuple[int, ...] | None:
        return sub_param_sizes((3,), 0, total) if self._in_three else None

    def _freeze_partition_sizes(self, total: int) -> tuple[int, ...]:
        sizes = super()._freeze_partition_sizes(total)
        if self._block is not None and 0 in sizes:
            raise RuntimeError(
                explain(
                    "a rank would get an empty query/key/value shard",
                    got=f"shares {list(self._cut().widths[0])} of {total // 3} elements",
                    fix="use fewer tensor-parallel ranks than there are heads",
                )
            )
        return sizes

    def _tp_partition(self, params_list: Sequence[Any]) -> None:
        if self.unsupported_reason and self.tp_world_size > 1:
            raise NotImplementedError(
                explain("a fused layer cannot be divided", got=self.unsupported_reason)
            )
        super()._tp_partition(params_list)
        if self._block is not None and self._subparam_shard_widths is not None:
            self._block.attn.split_size = self._subparam_shard_widths[0][self.tp_index]


class _YuanLayout:
    """The layout of Yuan's attention, which is not built: its parts are of noncontiguous head groups."""

    unsupported_reason: str | None = "Yuan's attention divides noncontiguous head groups"

    def _tp_partition(self, params_list: Sequence[Any]) -> None:
        if self.tp_world_size > 1:  # type: ignore[attr-defined]
            raise NotImplementedError(
                explain("Yuan's attention cannot be divided", got=self.unsupported_reason)
            )


class Yuan_LinearLayer(_YuanLayout, LinearLayer):
    """Query and key of Yuan; only as a whole."""


class Yuan_LinearAllreduce(_YuanLayout, LinearAllreduce):
    """The output projection of Yuan; only as a whole."""
