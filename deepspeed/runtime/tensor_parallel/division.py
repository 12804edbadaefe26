# SPDX-License-Identifier: Apache-2.0
"""Divides a model for an engine: finds its rules, makes the ranks' weights equal, cuts them, and watches their inputs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch

from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.checkpoint.format import Zero
from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.module_inject import auto_tp_model_utils as alibi
from deepspeed.module_inject import tp_shard
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import (
    AutoTPConfig,
    AutoTPPresets,
    PartitionType,
    TPLayerSpec,
    merge_autotp_configs,
    packed_attention,
)
from deepspeed.module_inject.tp_layer import TensorParallelLayer
from deepspeed.module_inject.tp_metadata import collect_autotp_universal_checkpoint_info
from deepspeed.module_inject.tp_parser import guess_specs
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from deepspeed.runtime.compiler import disable
from deepspeed.utils.errors import explain

from .config import TPTrainingConfig, _get_hf_tp_plan

INCONSISTENT = "Data inconsistency within the TP group. Please check the Dataloader implementation to ensure consistency."

_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "multi_query_group_num",
    "kv_n_heads",
)
_HEADS = ("num_attention_heads", "n_heads", "n_head", "attention_heads", "num_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def divide_model(
    model: torch.nn.Module, config: TPTrainingConfig, axis: Axis, group: Any, device: torch.device
) -> None:
    """Divide a model over tensor-parallel ranks, in place. Collective.

    Args:
        model: whole, and in any place; layers that are divided already stay so.
        config: section `tensor_parallel`.
        axis, group: the ranks that share layers.
        device: where collectives can read.

    Raises:
        ValueError: no rule is known for the model, the rules name none of its layers, or they cannot be followed.
        NotImplementedError: its parameters are sharded already.
    """
    set_units(model, config.tensor_parallel.tp_grain_size)
    division = AutoTP(model, [], partition_config=find_rules(model, config))
    division.set_tensor_parallel_config(axis.size, group)
    for layer in divide(division, lambda: division._replace_module(model), axis, device):
        layer.tp_overlap_comm = config.tp_overlap_comm
    setattr(model, UNIVERSAL_CHECKPOINT_INFO, collect_autotp_universal_checkpoint_info(model))


def divide(
    division: AutoTP, walk: Callable[[], object], axis: Axis, device: torch.device
) -> list[TensorParallelLayer]:
    """Divide layers of a model, in place. Collective.

    Args:
        division: what is done to each layer, over which ranks; it holds the model.
        walk: has the division replace the layers that are to be divided.
        axis, device: as for `divide_model`.

    Returns:
        All divided layers of the model.

    Raises:
        ValueError: none of its layers is divided though something should be, or rules cannot be followed.
        NotImplementedError: its parameters are sharded already.
    """
    model, rules = division.module, division.partition_config
    _refuse_sharded(model)
    _equal_weights(model, axis, device)
    heads = _first(model, _HEADS)
    walk()
    layers = [m for m in model.modules() if isinstance(m, TensorParallelLayer)]
    if not layers and rules is not None and _wants_any(rules):
        raise ValueError(
            explain(
                "tensor parallelism divides none of the model's layers",
                got=f"rules for {sorted({p for s in rules.layer_specs for p in s.patterns})}",
                expected='patterns that match names of linear layers with ".weight" behind',
            )
        )
    _divide_biases(model, heads, axis.rank)
    return layers


def _wants_any(rules: AutoTPConfig) -> bool:
    return any(spec.partition_type is not PartitionType.SKIP for spec in rules.layer_specs)


# - rules


def find_rules(model: torch.nn.Module, config: TPTrainingConfig) -> AutoTPConfig:
    """The rules for a model: the configuration's, else its own plan, else its family's, else guessed ones.

    Raises:
        ValueError: there are none, or the model's plan has an unknown style.
    """
    given = AutoTPConfig(use_default_specs=config.preset_model is None)
    if config.partition_config is not None:
        given = AutoTPConfig.from_dict(config.partition_config)
    if config.preset_model is not None:
        preset = _of_family(model, config.preset_model)
        assert preset is not None  # the section knows their names
        given = merge_autotp_configs(preset, given)
    if given.layer_specs and not given.use_default_specs:
        return given
    if any(isinstance(m, TensorParallelLayer) for m in model.modules()):
        return given
    own = _own_rules(model, needed=not given.layer_specs)
    return merge_autotp_configs(AutoTPConfig(own), given)


def _own_rules(model: torch.nn.Module, needed: bool) -> list[TPLayerSpec]:
    plan = _get_hf_tp_plan(model)
    if plan is not None:
        return TPPlanConverter.convert(plan) or []
    preset = _of_family(model, _family(model))
    if preset is not None:
        return preset.layer_specs
    try:
        found = guess_specs(model)
    except ValueError:
        if needed:
            raise
        return []
    if not found and needed:
        raise ValueError(
            explain(
                "how this model's layers are divided is not known",
                got=type(model).__name__,
                expected="a model with a tp_plan, or one whose layers have well-known names",
                fix="Write tensor_parallel.partition_config with layer_specs for it.",
            )
        )
    return found


def _of_family(model: torch.nn.Module, family: str | None) -> AutoTPConfig | None:
    family = None if family is None else family.lower()
    preset = None if family is None else AutoTPPresets.get_preset(family)
    packed = packed_attention(family, getattr(model, "config", None)) if preset else None
    if preset is not None and packed is not None:
        preset.layer_specs.insert(0, packed)
    return preset


def _family(model: torch.nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


# - the model's weights


def _refuse_sharded(model: torch.nn.Module) -> None:
    sharded = [
        n for n, p in model.named_parameters() if hasattr(p, "ds_id") or hasattr(p, "ds_shape")
    ]
    if sharded:
        raise NotImplementedError(
            explain(
                "a model built under zero.Init cannot be divided over tensor-parallel ranks",
                got=f"{len(sharded)} sharded parameters, the first {sharded[0]}",
                fix="build the model outside of zero.Init (with transformers: load it before TrainingArguments or "
                "HfDeepSpeedConfig of stage 3 exist); stage 3 shards what tensor parallelism leaves of it",
            )
        )


def set_units(model: torch.nn.Module, grain: int) -> None:
    """Say what shards are whole numbers of: heads, else `grain` elements."""
    kv_heads = _first(model, _KV_HEADS)
    tp_shard.set_num_kv_heads(_first(model, _HEADS) if kv_heads is None else kv_heads)
    tp_shard.set_n_embd(_first(model, _WIDTH))
    tp_shard.set_tp_grain_size(grain)


def _first(model: torch.nn.Module, names: tuple[str, ...]) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    found = (getattr(config, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def _equal_weights(model: torch.nn.Module, axis: Axis, device: torch.device) -> None:
    """Give all ranks the first one's weights before they are cut: parts of different models do not make one."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if getattr(tensor, "tensor_model_parallel", False) or tensor.is_meta:
            continue
        if getattr(tensor, "ds_zero_placement_family", None) == Zero.EXPERT_FAMILY:
            continue  # these ranks may hold different experts
        staged = tensor.data.to(device)
        flat.broadcast_(staged, axis)
        if staged.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(staged)


def _divide_biases(model: torch.nn.Module, heads: int | None, rank: int) -> None:
    """Have position biases by heads made for this rank's heads, whatever groups later engines make."""
    if heads is None:
        return

    def bloom(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return alibi.build_bloom_alibi_tensor(*args, **kwargs)

    helpers: dict[str, Callable[..., torch.Tensor]] = {
        "build_alibi_tensor": bloom,
        "build_mpt_alibi_tensor": alibi.build_mpt_alibi_tensor,
        "get_alibi_mask": alibi.get_alibi_mask,
    }
    for module in model.modules():
        for name, helper in helpers.items():
            if callable(getattr(module, name, None)):
                own = functools.partial(helper, rank=rank)
                alibi.install_head_sharded_helper(module, name, own, num_heads=heads)


# - the model's inputs


def check_inputs_once(model: torch.nn.Module, axis: Axis) -> None:
    """Have the next forward pass compare the inputs of the ranks that share layers.

    Raises there:
        AssertionError: they are not equal.
    """

    def compare(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hook.remove()
        told: list[Any] = [None] * axis.size
        torch.distributed.all_gather_object(told, _digest((args, kwargs)), group=axis.group)
        if any(other != told[0] for other in told):
            raise AssertionError(INCONSISTENT)

    hook = model.register_forward_pre_hook(disable(compare), with_kwargs=True)


def _digest(inputs: Any) -> list[Any]:
    """Shapes, dtypes and a hash of the bytes of all tensors in nested containers."""
    if isinstance(inputs, torch.Tensor):
        raw = inputs.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [tuple(inputs.shape), str(inputs.dtype), hashlib.sha256(raw.data).hexdigest()]
    if isinstance(inputs, dict):
        return [item for key in sorted(inputs, key=str) for item in (key, *_digest(inputs[key]))]
    if isinstance(inputs, (list, tuple)):
        return [item for value in inputs for item in _digest(value)]
    return []
