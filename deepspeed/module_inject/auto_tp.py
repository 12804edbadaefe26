# SPDX-License-Identifier: Apache-2.0
"""Divides a model's linear layers over tensor-parallel ranks, in place, by rules of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deepspeed import comm as dist
from deepspeed.comm.mesh import Axis
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .autotp_config import AutoTPConfig as AutoTPConfig
from .autotp_config import PartitionType as PartitionType
from .autotp_config import TPLayerSpec as TPLayerSpec
from .layers import (
    LinearAllreduce,
    LinearLayer,
    LmHeadLinearAllreduce,
    SubParamLinearAllreduce,
    SubParamLinearLayer,
    TensorParallelLayer,
)
from .tp_cut import Cut
from .tp_layer import _whole_shape, sum_grad_over_ranks
from .tp_metadata import DS_AUTOTP_UC_META, _build_param_uc_restore_meta
from .tp_parser import find_rows
from .tp_shard import get_shard_size, get_shard_size_list

# Attributes by which modules know how many heads they have, and how wide these are together.
HEAD_COUNTS = (
    "n_heads", "num_heads", "num_kv", "num_attention_heads", "num_attn_heads", "n_head", "num_key_value_heads",
    "num_kv_heads", "kv_n_heads",
)  # fmt: skip
HEAD_WIDTHS = ("inner_dim", "all_head_size", "embed_dim", "hidden_size", "d_model", "split_size")


class AutoTP:
    """Walks through a model and replaces what its rules name.

    Args:
        module: the model.
        all_reduce_linears: names of row layers, for models without rules: all their other linear layers are columns.
        prefix, state_dict, linear_layer_setting, orig_layer_impl, keep_module_on_host: accepted.
        partition_config: the rules.
    """

    def __init__(
        self,
        module: nn.Module,
        all_reduce_linears: Sequence[str],
        prefix: str = "",
        state_dict: Any = None,
        linear_layer_setting: Any = None,
        orig_layer_impl: Any = None,
        keep_module_on_host: bool = False,
        partition_config: AutoTPConfig | None = None,
    ) -> None:
        self.module = module
        self.all_reduce_linears = list(all_reduce_linears)
        self.prefix, self.state_dict = prefix, state_dict
        self.keep_module_on_host = keep_module_on_host
        self.partition_config = partition_config
        self.mp_size, self.mp_group = 1, None
        self.linear_policies: dict[type, Any] = {}
        self._shared = _shared_weights(module)
        # a layer that stands in several places is cut once
        self._made: dict[nn.Module, nn.Module] = {}

    def set_tensor_parallel_config(self, mp_size: int, mp_group: Any) -> None:
        """Say over which ranks layers are divided."""
        self.mp_size, self.mp_group = mp_size, mp_group

    def update_linear_policies(self) -> None:
        """Fix what happens to layers by their class, where there are no rules."""
        self.linear_policies = {} if self.partition_config else {nn.Linear: self._replace}

    @staticmethod
    def tp_parser(model: nn.Module) -> list[tuple[Any, list[str]]]:
        """Find the row layers of a model: the class of each kind of block, with their names in it.

        Raises:
            ValueError: none is found.
        """
        found: dict[type, set[str]] = {}
        for name in find_rows(model):
            block = next(
                (m for n, m in reversed(list(model.named_modules())) if n and name.startswith(f"{n}.") and n[-1].isdigit()),
                model,
            )  # fmt: skip
            found.setdefault(type(block), set()).add(name.rsplit(".", 1)[-1])
        if not found:
            raise ValueError(
                explain("no layers to divide were found in the model", got=type(model).__name__)
            )
        return [(kind, sorted(names)) for kind, names in found.items()]

    # - one layer

    def _get_model_type(self) -> str | None:
        return getattr(getattr(self.module, "config", None), "model_type", None)

    def _replace_with_config(self, child: nn.Module, full_name: str) -> nn.Module | None:
        """What the rules make of a layer; None leaves it as it is.

        Raises:
            ValueError: a rule cannot be followed, or none is about a linear layer though `strict_mode` is on.
        """
        assert self.partition_config is not None
        param_name = f"{full_name}.weight"
        spec = self.partition_config.find_matching_spec(param_name, self._get_model_type())
        if spec is None:
            if self.partition_config.strict_mode and isinstance(child, nn.Linear):
                raise ValueError(
                    explain(
                        "no rule of partition_config is about a linear layer",
                        got=param_name,
                        expected="one, since strict_mode is on",
                        fix='Add one, with "partition_type": "skip" if all ranks hold the layer.',
                    )
                )
            return None
        if spec.grad_allreduce:
            for param in child.parameters(recurse=False):
                sum_grad_over_ranks(param, self._axis)
        if spec.partition_type is PartitionType.SKIP or not _is_linear(child):
            return None
        if id(child.weight) in self._shared:
            logger.warning(f"{full_name} is not divided: another layer has the same weight")
            return None
        return self._divided(child, spec, full_name)

    @property
    def _axis(self) -> Axis:
        return Axis.alone() if self.mp_group is None else Axis.of_group(self.mp_group)

    def _divided(self, child: nn.Module, spec: TPLayerSpec, name: str) -> nn.Module:
        is_row = spec.partition_type is PartitionType.ROW
        dim = spec.get_effective_partition_dim()
        if dim != int(is_row):
            raise ValueError(
                explain(
                    f"{name} cannot be divided so",
                    got=f"partition_dim {dim} with partition_type {spec.partition_type.value}",
                    expected=f"{int(is_row)}",
                )
            )
        if is_row and (spec.split_input and spec.shape is None):
            return LmHeadLinearAllreduce(child, self.mp_group, name=name)
        if is_row and spec.shape is None:
            return LinearAllreduce(child, self.mp_group, name=name)
        if is_row:
            return SubParamLinearAllreduce(child, self.mp_group, shape=spec.shape, name=name)  # type: ignore[arg-type]
        options: dict[str, Any] = {"name": name, "gather_output": spec.gather_output}
        if spec.shape is None:
            return LinearLayer(child, self.mp_group, **options)
        return SubParamLinearLayer(child, self.mp_group, shape=spec.shape, **options)

    def _replace(self, child: nn.Module, name: str, conv_linear_layer: bool = False) -> nn.Module:
        """Divide a layer without rules: rows by their names, others as columns."""
        if any(name.endswith(row) for row in self.all_reduce_linears):
            return LinearAllreduce(child, self.mp_group, name=name)
        return LinearLayer(child, self.mp_group, name=name)

    def _slice_embedding(
        self, child: nn.Embedding, name: str, conv_linear_layer: bool = False
    ) -> nn.Embedding:
        """An embedding with this rank's part of its width."""
        whole = tuple(child.weight.shape)
        sizes = get_shard_size_list(whole[1], self.mp_size, name)
        own = Cut(1, (tuple(sizes),)).take(child.weight.data, dist.get_rank(group=self.mp_group))
        sliced = nn.Embedding(*own.shape, child.padding_idx, device="meta")
        sliced.weight = nn.Parameter(own, requires_grad=child.weight.requires_grad)
        meta = _build_param_uc_restore_meta(
            partition_type="row",
            partition_dim=1,
            logical_shape=whole,
            partition_sizes=sizes,
            target_partition_shape=tuple(own.shape),
            original_shape=whole,
        )
        sliced.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        setattr(sliced.weight, DS_AUTOTP_UC_META, meta)
        return sliced

    # - the walk

    def _replace_module(
        self, r_module: nn.Module, prev_name: str = "", prev_class_name: str = ""
    ) -> nn.Module:
        """Replace layers in place, everywhere below a module.

        Args:
            r_module: the module.
            prev_name: its name in its parent.
            prev_class_name: its full name in the model.
        """
        divided = False
        for name, child in list(r_module._modules.items()):
            if child is None:
                continue
            full_name = f"{prev_class_name}.{name}" if prev_class_name else name
            if isinstance(child, TensorParallelLayer) or hasattr(child, "deepspeed_moe"):
                continue
            if getattr(child, "_is_autoep_layer", False):
                self._replace_autoep_shared_experts(child, full_name)
                continue
            made = self._replacement(child, full_name)
            if made is None:
                self._replace_module(child, name, full_name)
                continue
            setattr(r_module, name, made)
            divided |= isinstance(made, TensorParallelLayer) and not getattr(
                made, "gather_output", False
            )
        if divided and any(hasattr(r_module, count) for count in HEAD_COUNTS):
            self.update_mp_params(r_module, prev_class_name)
        return r_module

    def _replace_autoep_shared_experts(self, layer: Any, full_name: str) -> None:
        """Replace layers of the expert that all tokens visit; its gate, the router and the others stay whole."""
        name = layer.shared_experts_name
        if name:
            self._replace_module(getattr(layer, name), name, f"{full_name}.{name}")

    def _replacement(self, child: nn.Module, full_name: str) -> nn.Module | None:
        if child in self._made:
            return self._made[child]
        made = None
        if self.partition_config is not None:
            made = self._replace_with_config(child, full_name)
        elif type(child) in self.linear_policies:
            made = self.linear_policies[type(child)](child, full_name)
        if made is not None:
            self._made[child] = made.train(child.training)
        return made

    def update_mp_params(self, child: nn.Module, full_name: str | None = None) -> None:
        """Set a module's numbers of heads, and their common widths, to this rank's."""
        rank = dist.get_rank(group=self.mp_group)
        for attribute in (*HEAD_COUNTS, *HEAD_WIDTHS):
            value = getattr(child, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(child, attribute, get_shard_size(value, self.mp_size, full_name, rank))


def _is_linear(child: nn.Module) -> bool:
    """Whether a module multiplies by a weight of shape (outputs, inputs), as far as can be told."""
    weight = getattr(child, "weight", None)
    if isinstance(child, nn.Embedding) or type(child).__name__ == "Conv1D":
        return False
    return isinstance(weight, torch.Tensor) and len(_whole_shape(weight)) == 2


def _shared_weights(module: nn.Module) -> set[int]:
    """Ids of the parameters that several modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for owner in module.modules():
        for param in owner._parameters.values():
            if param is not None:
                (shared if id(param) in seen else seen).add(id(param))
    return shared
