# SPDX-License-Identifier: Apache-2.0
"""A model's layers divided over ranks for inference, and what these ranks have to agree on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType, TPLayerSpec
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.tensor_parallel.division import divide, find_rules, set_units
from deepspeed.utils import env
from deepspeed.utils.errors import explain

from .config import DeepSpeedInferenceConfig

# GPT-2's layers, of the transposed kind: `_without_conv1d` turns them
_GPT2 = (
    TPLayerSpec([r".*attn\.c_attn\.weight$"], shape=(3, -1)),
    TPLayerSpec([r".*attn\.q_attn\.weight$", r".*mlp\.c_fc\.weight$"]),
    TPLayerSpec([r".*\.c_proj\.weight$"], PartitionType.ROW),
)


def ranks_of(config: DeepSpeedInferenceConfig) -> Axis:
    """The ranks that share layers with this one. Collective of all ranks where they are more than one.

    Neighbours share layers, unless the section brings a group, or an mpu that knows one.

    Raises:
        ValueError: the group has another size, or there are not as many ranks.
    """
    section: Any = config.tensor_parallel
    if not section.enabled or section.tp_size == 1:
        return Axis.alone()
    dist.init_distributed()
    get_accelerator().set_device(env.LOCAL_RANK.get() or 0)
    group = section.tp_group
    if group is None and section.mpu is not None:
        group = section.mpu.get_model_parallel_group()
    if group is not None:
        axis = Axis.of_group(group)
        if axis.size != section.tp_size:
            raise ValueError(
                explain(
                    "tensor_parallel.tp_size is not the size of its group",
                    got=section.tp_size,
                    expected=axis.size,
                )
            )
        return axis
    world = Axis.of_group(None)
    if world.size % section.tp_size:
        raise ValueError(
            explain(
                "the ranks cannot be put into groups of tensor_parallel.tp_size",
                got=f"tp_size {section.tp_size} in a job of {world.size} processes",
                expected="a divisor of the number of processes",
                fix=f"Start it with `deepspeed --num_gpus {section.tp_size} ...`, or set tp_size to {world.size}.",
            )
        )
    return world.split(section.tp_size, world)[0]


def divide_for_inference(model: nn.Module, config: DeepSpeedInferenceConfig, axis: Axis) -> None:
    """Divide a model over the ranks of an axis, in place. Collective.

    The rules are those of `injection_policy` (or `injection_policy_tuple`): in blocks of its classes the layers that it names
    are rows, all other linear layers columns. Without it, they are the model's own plan, its family's, or guessed.

    Raises:
        ValueError: no rule is known for the model, or none of its layers is divided.
    """
    set_units(model, config.tensor_parallel.tp_grain_size)
    policy = dict(_policy(config))
    rules = None if policy else _rules(model)
    division = AutoTP(model, [], partition_config=rules)
    division.set_tensor_parallel_config(axis.size, axis.group)
    device = torch.device(get_accelerator().current_device_name())
    if not policy:
        divide(division, lambda: division._replace_module(model), axis, device)
        return
    division.update_linear_policies()
    # biases of positions by heads are kept as embeddings
    division.linear_policies[nn.Embedding] = division._slice_embedding

    def walk() -> None:
        for kind, rows in policy.items():
            division.all_reduce_linears = rows
            for name, block in _outermost(model, kind):
                division._replace_module(block, "", name)

    if not divide(division, walk, axis, device):
        raise ValueError(
            explain(
                "injection_policy divides none of the model's layers",
                got=", ".join(str(kind) for kind in policy),
                expected=f"classes of blocks in {type(model).__name__}",
            )
        )


def _policy(config: DeepSpeedInferenceConfig) -> Iterator[tuple[Any, list[str]]]:
    """Classes of blocks, with the names in them of the layers whose results are added up; None is any class."""
    given: Mapping[Any, Any] = config.injection_policy or {}
    if not given and config.injection_policy_tuple is not None:
        given = {None: config.injection_policy_tuple}
    for kind, rows in given.items():
        names = [rows] if isinstance(rows, str) else rows
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                explain(
                    "injection_policy does not say how layers are divided",
                    got=f"{rows!r} for {kind}",
                    expected="names of the layers in it whose results are added up over the ranks",
                )
            )
        yield kind, [name.lstrip(".") for name in names]


def _outermost(model: nn.Module, kind: Any) -> list[tuple[str, nn.Module]]:
    """The blocks of a kind that are in no other one, with their names: what is inside is divided with them."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if _is_kind(module, kind) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def _is_kind(module: nn.Module, kind: Any) -> bool:
    if kind is None:  # a member of a list of blocks
        return isinstance(module, nn.ModuleList)
    return type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind)


def _rules(model: nn.Module) -> AutoTPConfig:
    if _without_conv1d(model):
        return AutoTPConfig(list(_GPT2), use_default_specs=False)
    return find_rules(model, TPTrainingConfig())


def _without_conv1d(model: nn.Module) -> bool:
    """Put linear layers in the place of transposed ones; returns whether there were any."""
    found = [
        (owner, name, layer)
        for owner in model.modules()
        for name, layer in owner.named_children()
        if type(layer).__name__ == "Conv1D"
    ]
    for owner, name, layer in found:
        old: Any = layer
        turned = nn.Linear(*old.weight.shape, device="meta")
        turned.weight = nn.Parameter(old.weight.detach().t().contiguous(), requires_grad=False)
        turned.bias = old.bias
        setattr(owner, name, turned)
    return bool(found)


def share_random_state(axis: Axis) -> None:
    """Have all ranks of an axis go on with the first one's random numbers, or they would draw different tokens."""
    if axis.size == 1:
        return
    accelerator = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    generators = [(torch.get_rng_state, torch.set_rng_state)]
    if device.type != "cpu":
        generators.append((accelerator.get_rng_state, accelerator.set_rng_state))
    for get, put in generators:
        state = get().to(device)
        flat.broadcast_(state, axis)
        put(state.cpu())
