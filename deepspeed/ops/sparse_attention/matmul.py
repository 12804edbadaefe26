# SPDX-License-Identifier: Apache-2.0
"""Products of which one matrix, or the result, exists in some blocks only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepspeed.utils.errors import explain

_MODES = ("sdd", "dsd", "dds")


class MatMul:
    """`a @ b`, where the letters of `mode` say what is sparse: the result, `a`, `b`.

    A sparse matrix is `[batch, blocks, block, block]`, its blocks in the order of the layout's ones.

    Args:
        layout: ones and zeros, `[heads, rows, columns]` in blocks, of the sparse matrix as it is stored.
        block: side of a block.
        mode: "sdd", "dsd" or "dds".
        trans_a, trans_b: a matrix is given transposed.
        bench: unused.

    Raises:
        NotImplementedError: an unknown mode.
    """

    def __init__(
        self,
        layout: Tensor,
        block: int,
        mode: str,
        trans_a: bool = False,
        trans_b: bool = False,
        bench: bool = False,
    ) -> None:
        if mode not in _MODES:
            raise NotImplementedError(
                explain("Supported modes are sdd, dsd and dds", got=mode, expected=_MODES)
            )
        self.layout, self.block, self.mode = layout, block, mode
        self.trans_a, self.trans_b, self.bench = trans_a, trans_b, bench

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply; differentiable.

        Args:
            a, b: dense ones are `[batch, heads, rows, columns]`.

        Raises:
            ValueError: a shape that does not go with the layout.
        """
        if self.mode == "sdd":
            a = a.transpose(-1, -2) if self.trans_a else a
            b = b.transpose(-1, -2) if self.trans_b else b
            return self._sampled(a, b)
        if self.mode == "dsd":
            return self._times(a, b.transpose(-1, -2) if self.trans_b else b, self.trans_a)
        # a @ b is the transpose of the product of the transposes
        dense = a if self.trans_a else a.transpose(-1, -2)
        return self._times(b, dense, not self.trans_b).transpose(-1, -2)

    def _places(self, device: Any, swap: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        head, row, column = self.layout.to(device).nonzero(as_tuple=True)
        return (head, column, row) if swap else (head, row, column)

    def _sampled(self, a: Tensor, b: Tensor) -> Tensor:
        heads, rows, columns = self.layout.shape
        sides = (heads, rows * self.block, columns * self.block)
        if (a.shape[1], a.shape[2], b.shape[3]) != sides:
            self._refuse(f"{tuple(a.shape)} @ {tuple(b.shape)}")
        head, row, column = self._places(a.device)
        left = a.unflatten(2, (rows, self.block))[:, head, row]
        right = b.unflatten(3, (columns, self.block)).transpose(2, 3)[:, head, column]
        return left @ right

    def _times(self, sparse: Tensor, dense: Tensor, swap: bool) -> Tensor:
        heads, rows, columns = self.layout.shape
        if swap:
            rows, columns, sparse = columns, rows, sparse.transpose(-1, -2)
        head, row, column = self._places(dense.device, swap)
        batch, given, length, width = dense.shape
        if (sparse.shape[1], given, length) != (len(head), heads, columns * self.block):
            self._refuse(f"{sparse.shape[1]} blocks and {tuple(dense.shape)}")
        pieces = sparse @ dense.unflatten(2, (columns, self.block))[:, head, column]
        out = pieces.new_zeros(batch, heads * rows, self.block, width)
        return out.index_add(1, head * rows + row, pieces).view(batch, heads, -1, width)

    def _refuse(self, got: str) -> None:
        raise ValueError(
            explain(
                "the matrices do not go with the layout",
                got=got,
                expected=f"a layout of {tuple(self.layout.shape)} blocks of {self.block}, mode {self.mode}",
            )
        )
