# SPDX-License-Identifier: Apache-2.0
"""Rows of an embedding's gradient add up like the dense gradients they stand for."""

import pytest
import torch

from deepspeed.runtime.sparse_tensor import SparseTensor


def gradient(rows, weight=1.0):
    embedding = torch.nn.Embedding(6, 3, sparse=True)
    (embedding(torch.tensor(rows)) * weight).sum().backward()
    return embedding.weight.grad


def test_repeated_rows_are_summed():
    sparse = SparseTensor(gradient([1, 1, 4]))
    assert sparse.indices.tolist() == [1, 4]
    assert sparse.values.tolist() == [[2.0] * 3, [1.0] * 3]
    assert sparse.dense_size == [6, 3]
    assert sparse.dtype == torch.float32
    assert sparse.sparse_size() == (8, 18)


def test_adding_is_adding_the_dense_gradients():
    first, second = gradient([1, 4], 2.0), gradient([4, 5, 5])
    sparse = SparseTensor(first)
    sparse.add(SparseTensor(second))
    wanted = first.to_dense() + second.to_dense()
    assert torch.equal(sparse.to_dense(), wanted)
    assert torch.equal(sparse.to_coo_tensor().coalesce().to_dense(), wanted)


def test_an_empty_shell_can_be_filled():
    shell = SparseTensor()
    assert (shell.indices, shell.values, shell.dense_size) == (None, None, None)
    shell.indices, shell.values, shell.dense_size = torch.tensor([2]), torch.ones(1, 3), [6, 3]
    assert shell.to_dense()[2].tolist() == [1.0] * 3
    assert "deepspeed.SparseTensor" in str(shell)


def test_rows_that_are_not_zero_are_taken_of_a_dense_matrix():
    dense = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 2.0]])
    sparse = SparseTensor(dense)
    assert sparse.indices.tolist() == [1, 2]
    assert torch.equal(sparse.to_dense(), dense)


def test_other_shapes_are_refused():
    other = SparseTensor(torch.zeros(5, 3).to_sparse(1))
    with pytest.raises(ValueError, match="two shapes"):
        SparseTensor(gradient([1])).add(other)
