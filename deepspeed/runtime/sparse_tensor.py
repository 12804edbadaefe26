# SPDX-License-Identifier: Apache-2.0
"""A sparse gradient of an embedding, as rows and their indices, that can be summed by concatenation."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.utils.errors import explain


class SparseTensor:
    """Rows of a mostly empty matrix.

    Args:
        dense_tensor: a torch sparse tensor (the gradient of `torch.nn.Embedding(sparse=True)`), a dense matrix of
            which the rows are taken that are not zero, or None for an empty shell whose fields are set afterwards.

    Attributes:
        indices: [n] int64, which rows; a row may be there more than once, then they add up.
        values: [n, ...], the rows.
        dense_size: shape of the matrix.
    """

    def __init__(self, dense_tensor: Tensor | None = None) -> None:
        self.orig_dense_tensor = dense_tensor
        self.indices: Tensor | None = None
        self.values: Tensor | None = None
        self.dense_size: list[int] | None = None
        if dense_tensor is None:
            return
        self.is_sparse = True
        self.dtype = dense_tensor.dtype
        if dense_tensor.is_sparse:
            summed = dense_tensor.coalesce()
            self.indices, self.values = summed.indices().flatten(), summed.values()
        else:
            self.indices = dense_tensor.flatten(1).any(dim=1).nonzero().flatten()
            self.values = dense_tensor[self.indices]
        self.dense_size = list(dense_tensor.size())

    @staticmethod
    def type() -> str:
        """Name of this kind of tensor."""
        return "deepspeed.SparseTensor"

    def to_coo_tensor(self) -> Tensor:
        """The same as a torch sparse tensor."""
        assert self.indices is not None and self.values is not None and self.dense_size is not None
        return torch.sparse_coo_tensor(
            self.indices.unsqueeze(0), self.values, self.dense_size, check_invariants=False
        )

    def to_dense(self) -> Tensor:
        """The same as a dense tensor."""
        return self.to_coo_tensor().to_dense()

    def sparse_size(self) -> tuple[int, int]:
        """`(numbers stored here, numbers of the dense matrix)`."""
        assert self.indices is not None and self.values is not None and self.dense_size is not None
        return self.indices.numel() + self.values.numel(), torch.Size(self.dense_size).numel()

    def add(self, b: SparseTensor) -> None:
        """Add another one of the same shape to this one.

        Raises:
            ValueError: the shapes differ.
        """
        if self.dense_size != b.dense_size:
            raise ValueError(
                explain("sparse gradients of two shapes", got=f"{self.dense_size} + {b.dense_size}")
            )
        own_rows, own_values = self._filled()
        rows, values = b._filled()
        self.indices = torch.cat((own_rows, rows))
        self.values = torch.cat((own_values, values))

    def _filled(self) -> tuple[Tensor, Tensor]:
        assert self.indices is not None and self.values is not None
        return self.indices, self.values

    def __str__(self) -> str:
        stored, dense = self.sparse_size()
        return (
            f"{self.type()}(indices={self.indices}, values={self.values}, "
            f"size={self.dense_size}, dense/stored={dense / max(1, stored):.1f})"
        )
