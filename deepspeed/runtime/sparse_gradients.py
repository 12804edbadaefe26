# SPDX-License-Identifier: Apache-2.0
"""Gradients of embeddings, of which a batch touches few rows: only those rows travel between the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis

from .sparse_tensor import SparseTensor
from .torch_autocast import get_comm_dtype
from .zero.buckets import scale_factors
from .zero.plan import Plan


def row_layers(module: torch.nn.Module, every: bool) -> dict[str, torch.nn.Module]:
    """The embeddings of a model whose gradients travel as rows, by the names of their weights.

    Args:
        module: the model.
        every: take all embeddings, not only those that were made with `sparse=True`.
    """
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {
        f"{name}.weight" if name else "weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and (every or layer.sparse)
    }


def row_names(engine: Any) -> set[str]:
    """The names of an engine's weights whose gradients travel as rows."""
    return set(row_layers(engine.module, engine.sparse_gradients_enabled()))


def grad_values(param: torch.nn.Parameter) -> Tensor:
    """The gradient's numbers, to be read or changed in place: of a sparse one those that it stores, each row once."""
    if param.grad is None or not param.grad.is_sparse:
        return cast(Tensor, param.grad)
    param.grad = param.grad.coalesce()
    return param.grad._values()


@torch.no_grad()
def average_rows(
    param: torch.nn.Parameter, sparse: bool, axis: Axis, plan: Plan, dtype: torch.dtype | None
) -> None:
    """Average the gradient of an embedding over `axis`; a collective of its ranks.

    A gradient stays as it is laid out, sparse or dense. Where the ranks have as many rows together as the whole matrix,
    the matrix travels instead.

    Args:
        param: the weight, [rows, width]; without a gradient it has no rows.
        sparse: how the gradient is laid out where there was none.
        axis: ranks to average over.
        plan: how gradients are scaled.
        dtype: dtype on the wire; None is autocast's for a parameter that is marked so, else the gradient's own.
    """
    if axis.size == 1:
        return
    if param.grad is None:
        rows, values = param.new_empty(0, dtype=torch.int64), param.detach()[:0]
    else:
        sparse = param.grad.is_sparse
        rows, values = SparseTensor(param.grad)._filled()
    before, after = scale_factors(plan, axis.size)
    values = values.to(dtype or get_comm_dtype(param)) * before
    counts = torch.empty(axis.size, dtype=torch.int64, device=param.device)
    flat.all_gather_into(counts, counts.new_full((1,), len(rows)), axis)
    most = int(counts.max())
    total = torch.zeros(param.shape, dtype=values.dtype, device=param.device)
    if most * axis.size >= len(param):
        total[rows] = values
        flat.all_reduce_(total.view(-1), axis)
        summed = total.to_sparse(1) if sparse else total
    else:
        pieces = list(_gathered(rows, values, counts.tolist(), most, axis))
        if sparse:
            every, numbers = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            summed = torch.sparse_coo_tensor(
                every.unsqueeze(0), numbers, param.shape, check_invariants=False
            ).coalesce()
        else:
            # one rank's rows are all different: the order of sums is that of the ranks
            for where, numbers in pieces:
                total.index_add_(0, where, numbers)
            summed = total
    param.grad = summed.to(param.dtype) * after


def _gathered(
    rows: Tensor, values: Tensor, counts: list[int], most: int, axis: Axis
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every rank's rows and their numbers; all ranks send as much as the one with the most rows."""
    width = values.shape[1:].numel()
    own_rows, own_values = rows.new_zeros(most), values.new_zeros(most, width)
    own_rows[: len(rows)], own_values[: len(rows)] = rows, values.reshape(len(rows), width)
    all_rows = own_rows.new_empty(axis.size * most)
    all_values = own_values.new_empty(axis.size * most * width)
    flat.all_gather_into(all_rows, own_rows, axis)
    flat.all_gather_into(all_values, own_values.view(-1), axis)
    for rank, count in enumerate(counts):
        numbers = all_values.view(axis.size, most, width)[rank, :count]
        yield all_rows.view(axis.size, most)[rank, :count], numbers.view(count, *values.shape[1:])


class SparseGradients:
    """Attributes of the engine about how gradients are combined outside of ZeRO."""

    driver: Any
    plan: Plan

    @property
    def gradient_average(self) -> bool:
        """Whether gradients are averaged over the ranks; set to False, they are added up (stage 0 in fp32)."""
        return self.plan.gradient_op != "sum"

    @gradient_average.setter
    def gradient_average(self, value: bool) -> None:
        if value != self.gradient_average:
            plan = replace(self.plan, gradient_op="mean" if value else "sum")
            self.driver.change_scaling(plan)
            self.plan = plan

    def all_gather_scalar(self, value: Tensor, dp_group: Any) -> list[Tensor]:
        """The ranks' values of a tensor, of one shape everywhere; a collective of the group."""
        found = [torch.empty_like(value) for _ in range(dist.get_world_size(dp_group))]
        dist.all_gather(found, value.detach().contiguous(), group=dp_group)
        return found
