# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights are divided over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deepspeed.accelerator.product_functions import autocast_on
from deepspeed.comm.mesh import Axis
from deepspeed.compile.custom_ops import tp_collectives as in_graph
from deepspeed.utils.errors import explain

from .tp_collectives import (
    gather_columns,
    gather_parts,
    overlapped_linear,
    sum_of_grads,
    sum_over_ranks,
    summed,
)
from .tp_cut import Cut, shard_widths
from .tp_metadata import DS_AUTOTP_UC_META, _build_param_uc_restore_meta
from .tp_shard import get_shard_size_list

GRAD_ALLREDUCE = "_ds_grad_allreduce_registered"
_SHARD = "_ds_tp_shard"

_training = False


def set_autotp_mode(training: bool = False) -> None:
    """Say whether models are divided for training."""
    global _training
    _training = training


def is_autotp_training_mode() -> bool:
    """Return whether models are divided for training."""
    return _training


class TensorParallelLayer(nn.Module):
    """A linear layer that holds this rank's part of the weights.

    The parameters are the original layer's objects with other data, so optimizers made before go on with them. Each that is
    divided has the methods `gather_params` and `_tp_partition` of its layer, and counts as model-parallel in norms.

    Args:
        module: layer with a weight of shape (outputs, inputs) and perhaps a bias.
        mp_group: the tensor-parallel process group; None for a layer that stays whole.
        skip_partition: leave the weights whole; a later `_tp_partition` cuts them.
        name: full name in the model, which says what its shards are aligned to.
    """

    partition_type = "column"
    partition_dim = 0
    tp_overlap_comm = False
    defer_collectives_to_compiler = False
    unsupported_reason: str | None = None
    bias: nn.Parameter | None

    def __init__(
        self,
        module: nn.Module,
        mp_group: Any = None,
        skip_partition: bool = False,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__()
        weight: Any = module.weight
        self.weight: nn.Parameter = weight
        bias: Any = getattr(module, "bias", None)
        self.register_parameter("bias", bias)
        self.name, self.mp_group = name, mp_group
        self.axis = Axis.alone() if mp_group is None else Axis.of_group(mp_group)
        self.tp_world_size, self.tp_index = self.axis.size, self.axis.rank
        self._orig_weight_shape = _whole_shape(weight)
        self._partition_sizes: tuple[int, ...] = ()
        self._subparam_sizes: tuple[int, ...] | None = None
        self._subparam_shard_widths: Sequence[Sequence[int]] | None = None
        self._freeze_partition_sizes(self._orig_weight_shape[self.partition_dim])
        if not skip_partition:
            self._tp_partition([self.weight, self.bias])
        self._mark_params()
        self._mark_uc_metadata()

    # - where it is cut

    def _freeze_partition_sizes(self, total: int) -> tuple[int, ...]:
        """Fix where the weights are cut, since what that depends on changes with the next model."""
        joined = self._joined_sizes(total)
        if joined is None:
            sizes = get_shard_size_list(total, self.tp_world_size, self.name)
            self._partition_sizes = tuple(sizes)
        else:
            self._subparam_sizes = joined
            self._subparam_shard_widths = shard_widths(joined, self.tp_world_size, self.name)
        return self._cut().by_rank

    def _joined_sizes(self, total: int) -> tuple[int, ...] | None:
        """The sizes of the weights that are joined in one; None for a single one."""
        return None

    def _cut(self, is_bias: bool = False) -> Cut:
        if is_bias and self.partition_dim != 0:
            return Cut(None)
        widths = self._subparam_shard_widths or (self._partition_sizes,)
        return Cut(self.partition_dim, tuple(tuple(per_rank) for per_rank in widths))

    def _is_bias(self, param: Any, place: int) -> bool:
        return param is self.bias or (param is not self.weight and place == 1)

    @torch.no_grad()
    def _tp_partition(self, params_list: Sequence[Any]) -> None:
        """Leave each parameter this rank's part: `weight, bias` in this order, or any of them.

        Raises:
            ValueError: a parameter is not whole.
        """
        for place, param in enumerate(params_list):
            cut = self._cut(self._is_bias(param, place))
            if param is None or cut.dim is None:
                continue
            shard = param.__dict__.pop(_SHARD, None)
            if self.tp_world_size == 1 and shard is None:
                continue
            part = cut.take(param.data, self.tp_index)
            if shard is None:
                param.data = part
            else:  # what it was before it was gathered may be a view of an optimizer's memory
                param.data = shard.copy_(part)

    @torch.no_grad()
    def gather_params(self, params_list: Sequence[Any]) -> None:
        """Make parameters whole, until `_tp_partition`; a collective of the tensor-parallel ranks.

        Raises:
            RuntimeError: their parts cannot be joined.
        """
        if self.unsupported_reason:
            raise RuntimeError(
                explain("a layer's weights cannot be gathered", got=self.unsupported_reason)
            )
        for place, param in enumerate(params_list):
            cut = self._cut(self._is_bias(param, place))
            if param is None or cut.dim is None:
                continue
            shard = param.data
            parts = gather_parts(shard, cut.dim, cut.by_rank, self.axis)
            param.__dict__[_SHARD] = shard
            param.data = cut.join(parts) if self.axis.size > 1 else shard.clone()

    # - what parameters say of themselves

    def _mark_params(self) -> None:
        held: tuple[tuple[Any, bool], ...] = ((self.weight, False), (self.bias, True))
        for param, is_bias in held:
            if param is not None and self._cut(is_bias).dim is not None:
                param.tensor_model_parallel = True
                param.gather_params = self.gather_params
                param._tp_partition = self._tp_partition

    def _mark_uc_metadata(self) -> None:
        """Tell checkpoints how the parameters are cut."""
        setattr(self.weight, DS_AUTOTP_UC_META, self._meta(False))
        if self.bias is not None:
            setattr(self.bias, DS_AUTOTP_UC_META, self._meta(True))

    def _meta(self, is_bias: bool) -> dict[str, Any]:
        outputs = self._orig_weight_shape[0]
        param: Any = self.bias if is_bias else self.weight
        cut = self._cut(is_bias)
        whole = (outputs,) if is_bias else self._orig_weight_shape
        joined = self._subparam_shard_widths is not None and cut.dim is not None
        if cut.dim is not None:
            whole = tuple(
                sum(cut.sizes) if at == cut.dim else n for at, n in enumerate(tuple(whole))
            )
        return _build_param_uc_restore_meta(
            partition_type=self.partition_type,
            partition_dim=cut.dim,
            logical_shape=whole,
            output_shape=(whole[0],),
            sub_param_shape=self._rule_shape(is_bias) if joined else None,
            sub_param_sizes=cut.sizes if joined else None,
            sub_param_shard_widths=cut.widths if joined else None,
            partition_sizes=None if joined or cut.dim is None else cut.by_rank,
            target_partition_shape=tuple(param.shape),
            original_shape=whole,
            is_bias=is_bias,
            replicated=cut.dim is None,
            unsupported_reason=self.unsupported_reason,
        )

    def _rule_shape(self, is_bias: bool) -> tuple[Any, ...]:
        """Joined weights' sizes in the place of their dimension."""
        sizes = self._subparam_sizes or ()
        if is_bias:
            return (sizes,)
        whole = self._orig_weight_shape
        return tuple(sizes if at == self.partition_dim else n for at, n in enumerate(whole))

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.partition_type}, {self.tp_index} of {self.tp_world_size}, cut {self._cut().by_rank}"


class LinearLayer(TensorParallelLayer):
    """Column-parallel: each rank computes some of the outputs.

    Args:
        module, mp_group, skip_partition, name: as in `TensorParallelLayer`.
        gather_output: give every rank all outputs.
    """

    def __init__(
        self,
        module: nn.Module,
        mp_group: Any = None,
        skip_partition: bool = False,
        *,
        name: str | None = None,
        gather_output: bool = False,
    ) -> None:
        super().__init__(module, mp_group, skip_partition, name=name)
        self.gather_output = gather_output

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map inputs of shape (..., inputs) to this rank's outputs, or to all."""
        if self.defer_collectives_to_compiler:
            return self._forward_in_graph(input)
        casts = torch.is_autocast_enabled() or autocast_on()  # on a GPU, or on the CPU
        if self.tp_overlap_comm and self.axis.size > 1 and not casts:
            output = overlapped_linear(input, self.weight, self.axis)
            output = output if self.bias is None else output + self.bias
        else:
            shared = sum_of_grads(input, self.axis)
            output = functional.linear(shared, self.weight, self.bias)
        if self.gather_output:
            output = gather_columns(output, self.axis, self._cut())
        return output

    def _forward_in_graph(self, input: torch.Tensor) -> torch.Tensor:
        output = functional.linear(in_graph.sum_of_grads(input), self.weight, self.bias)
        if self.gather_output:
            output = in_graph.gather_columns(output, self._partition_sizes, self.tp_index)
        return output


class LinearAllreduce(TensorParallelLayer):
    """Row-parallel: each rank takes some of the inputs, and the results are added up; all ranks hold the bias."""

    partition_type = "row"
    partition_dim = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map this rank's inputs to outputs of shape (..., outputs), equal on all ranks."""
        partial = functional.linear(input, self.weight)
        if self.defer_collectives_to_compiler:
            output = in_graph.sum_over_ranks(partial)
        else:
            output = sum_over_ranks(partial, self.axis)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class LmHeadLinearAllreduce(LinearAllreduce):
    """A row-parallel layer that is given all inputs and takes its own of them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map all inputs to outputs of shape (..., outputs), equal on all ranks."""
        sizes = self._partition_sizes
        own = sum_of_grads(input, self.axis)
        own = own.narrow(-1, sum(sizes[: self.tp_index]), sizes[self.tp_index])
        return super().forward(own)


def sum_grad_over_ranks(param: nn.Parameter, axis: Axis) -> None:
    """Have a parameter's gradient summed: each rank uses it on its own heads, and so sees a part of the gradient."""
    if axis.size > 1 and not getattr(param, GRAD_ALLREDUCE, False) and param.requires_grad:
        param.register_hook(lambda grad: summed(grad, axis))
        setattr(param, GRAD_ALLREDUCE, True)


def _whole_shape(param: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


class GatherReplacedLayerParams:
    """Makes divided parameters whole inside, and divides what they are then; a collective of the tensor-parallel ranks.

    Args:
        params: a parameter or several; those that are not divided are left alone.
        module: unused.
        enabled: False does nothing.

    Example:
        >>> with GatherReplacedLayerParams(list(engine.module.parameters()), engine.module):
        ...     weights = {n: p.detach().cpu() for n, p in engine.module.named_parameters()}
    """

    def __init__(self, params: Any, module: Any = None, enabled: bool = True) -> None:
        listed = [params] if isinstance(params, torch.Tensor) else list(params)
        self.module, self.enabled = module, enabled
        self.params: list[Any] = [p for p in listed if enabled and hasattr(p, "gather_params")]

    def __enter__(self) -> None:
        for param in self.params:
            param.gather_params([param])

    def __exit__(self, *_: object) -> None:
        for param in self.params:
            param._tp_partition([param])
