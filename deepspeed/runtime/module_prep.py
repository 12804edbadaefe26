# SPDX-License-Identifier: Apache-2.0
"""What is done to a module and its process before training: local rank, device, dtype, equal weights on all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.comm.mesh import Mesh
from deepspeed.utils import env, groups
from deepspeed.utils.errors import explain

from .precision import Precision
from .zero.utils import is_zero_param


def take_local_rank(args: Any) -> int:
    """This process's index on its node, from the environment; `args.local_rank` must agree and is set to it.

    Raises:
        AssertionError: if the environment does not say it, or says two things.
    """
    slurm, mpi = env.LOCAL_RANK.get(), env.OMPI_LOCAL_RANK.get()
    if slurm is not None and mpi is not None and slurm != mpi:
        raise AssertionError(
            explain(
                "the environment gives two local ranks",
                got=f"LOCAL_RANK={slurm} and OMPI_COMM_WORLD_LOCAL_RANK={mpi}",
                expected="equal values",
                fix="unset the one that is wrong",
            )
        )
    rank = slurm if slurm is not None else mpi
    if rank is None:
        raise AssertionError(
            explain(
                "the environment does not say which process of this node this is",
                got="no LOCAL_RANK",
                expected="LOCAL_RANK=0 … in each process",
                fix="start the script with the deepspeed launcher, or call deepspeed.init_distributed() first",
            )
        )
    given = _get(args, "local_rank")
    if given is not None and given >= 0 and given != rank:
        raise AssertionError(
            explain(
                "args.local_rank and the environment disagree",
                got=f"args.local_rank={given} and LOCAL_RANK={rank}",
                expected="equal values",
                fix="do not set --local_rank by hand",
            )
        )
    if args is not None and not isinstance(args, dict) and hasattr(args, "local_rank"):
        args.local_rank = rank
    return rank


def take_device(args: Any, local_rank: int, model: torch.nn.Module, keep: bool) -> torch.device:
    """Make the accelerator's device of this process current, and return it."""
    if keep:
        first = next(iter(model.parameters()), None)
        return torch.device("cpu") if first is None else first.device
    accelerator = get_accelerator()
    index = _get(args, "device_rank")
    index = local_rank if index is None else index
    accelerator.set_device(index)
    return torch.device(accelerator.device_name(index))


def prepare_module(
    model: torch.nn.Module,
    precision: Precision,
    mesh: Mesh,
    device: torch.device,
    keep_device: bool,
) -> torch.nn.Module:
    """Cast parameters, move the module to its device, and give all ranks the weights of the first.

    Buffers keep their dtype unless the configuration names one; parameters that `zero.Init` has sharded are as they
    should be.
    """
    cast_module(model, precision.compute, precision.buffers)
    if not keep_device:
        model.to(device)
    for tensor in list(model.parameters()) + list(model.buffers()):
        if is_zero_param(tensor) or getattr(tensor, "ds_base_shard", False):
            continue
        axis = mesh.sequence_data
        if not getattr(tensor, "allreduce", True):
            axis = mesh.expert_data[tensor.group_name]
        flat.broadcast_(tensor.data, axis)
    return model


def cast_module(
    model: torch.nn.Module, params: torch.dtype | None, buffers: torch.dtype | None
) -> None:
    """Cast floating parameters that are not sharded, and floating buffers, in place; None leaves them."""
    if params is not None:
        for param in model.parameters():
            if param.is_floating_point() and not is_zero_param(param):
                param.data = param.data.to(params)
    if buffers is not None:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(buffers)


def prepare_moe(model: torch.nn.Module, config: Any, mpu: Any = None) -> tuple[bool, list[int]]:
    """Make the expert-parallel groups of MoE layers; returns whether there are any, and their expert counts."""
    layers = [m for m in model.modules() if hasattr(m, "set_deepspeed_parallelism")]
    divided = any(getattr(layer, "enable_expert_tensor_parallelism", False) for layer in layers)
    if divided and mpu is not None:
        groups.mpu = mpu
    for layer in layers:
        layer.set_deepspeed_parallelism(config.use_data_before_expert_parallel_)
    counts = [layer.num_experts for layer in layers if hasattr(layer, "num_experts")]
    return bool(counts), counts


def moe_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The MOELayer objects of a model (they hold a gate and experts)."""
    return [m for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]


def cast_inputs(inputs: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors in nested tuples, lists and dicts."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(cast_inputs(item, dtype) for item in inputs)
    if isinstance(inputs, dict):
        return {key: cast_inputs(item, dtype) for key, item in inputs.items()}
    return inputs


def check_loss(loss: Any, optimizer: Any) -> None:
    """Refuse what cannot be back-propagated.

    Raises:
        AssertionError: if `loss` is no one-element tensor with a graph, or there is no optimizer.
    """
    if optimizer is None:
        raise AssertionError(
            explain(
                "must provide optimizer during init in order to use backward",
                got="an engine without an optimizer",
                fix="pass optimizer= to deepspeed.initialize, or add an 'optimizer' section",
            )
        )
    if not isinstance(loss, torch.Tensor):
        raise AssertionError(
            explain(
                "backward needs the loss as a tensor",
                got=type(loss).__name__,
                expected="torch.Tensor",
            )
        )
    if loss.numel() != 1:
        raise AssertionError(
            explain(
                "backward needs the loss as a scalar tensor",
                got=f"a tensor of shape {tuple(loss.shape)}",
                expected="one element",
                fix="reduce it first, for example with .mean()",
            )
        )
    if not loss.requires_grad:
        raise AssertionError(
            explain(
                "the loss depends on no trainable parameter",
                got="a tensor without grad_fn",
                expected="a loss computed from the module's output with gradients enabled",
                fix="compute it outside torch.no_grad(), and do not detach it",
            )
        )


def need_sharded(optimizer: Any) -> Any:
    """An optimizer whose states can be moved.

    Raises:
        AssertionError: for none, or a plain torch optimizer.
    """
    if not hasattr(optimizer, "groups"):
        raise AssertionError(
            explain(
                "only the states of a ZeRO optimizer can be offloaded and reloaded",
                got=type(optimizer).__name__,
                expected="stage 1, 2 or 3",
            )
        )
    return optimizer


def named_strays(
    optimizer: torch.optim.Optimizer, params: Iterable[torch.nn.Parameter]
) -> list[tuple[int, torch.Size]]:
    """`(group, shape)` of the optimizer's parameters that are not among `params`."""
    known = {id(p) for p in params}
    return [
        (index, param.shape)
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
        if id(param) not in known
    ]


def _get(args: Any, name: str) -> Any:
    if args is None:
        return None
    return args.get(name) if isinstance(args, dict) else getattr(args, name, None)
