# SPDX-License-Identifier: Apache-2.0
"""Norms, clipping and overflow checks over params whose elements may be spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_group,
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
)
from deepspeed.utils.errors import explain

PIPE_REPLICATED = "ds_pipe_replicated"


def is_model_parallel_parameter(p: torch.Tensor) -> bool:
    """Say whether a param is a share of a layer's weights (and not the same on all shares)."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def has_inf_or_nan(x: torch.Tensor) -> torch.Tensor:
    """Return a 0-dim bool tensor: whether any element is infinite or not a number."""
    return torch.logical_not(torch.isfinite(x)).any()


def is_invalid_grad_norm(norm: float | torch.Tensor) -> bool:
    """Say whether a norm is infinite, not a number, or the -1 that stands for those."""
    value = float(norm)
    return value == -1 or not math.isfinite(value)


def _norms(tensors: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Return the norm of all elements of all tensors, 0-dim, float32 for lower precisions.

    The sum of each tensor is taken first, then that of the sums: torch.nn.utils does the same, so
    clipping agrees with it bit for bit.
    """
    if not tensors:
        return torch.zeros((), device="cpu")
    device = tensors[0].device
    each = [
        torch.linalg.vector_norm(
            tensor.detach(), norm_type, dtype=torch.float32 if tensor.itemsize < 4 else None
        ).to(device)
        for tensor in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(each), norm_type)


def _counted(params: Iterable[torch.Tensor], mpu: Any) -> list[torch.Tensor]:
    """Return the params that this rank counts, so that each element of the model counts once."""
    first = bwc_tensor_model_parallel_rank(mpu) == 0
    return [
        param
        for param in params
        if not (mpu is not None and getattr(param, PIPE_REPLICATED, False))
        and (first or is_model_parallel_parameter(param))
    ]


def _over_model(norm: torch.Tensor, norm_type: float, mpu: Any) -> torch.Tensor:
    """Combine the shares' norms over a client's tensor- and pipeline-parallel ranks."""
    for size, group in (
        (bwc_tensor_model_parallel_world_size, bwc_tensor_model_parallel_group),
        (bwc_pipeline_parallel_world_size, bwc_pipeline_parallel_group),
    ):
        if mpu is None or size(mpu) <= 1:
            continue
        if norm_type == math.inf:
            dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=group(mpu))
        else:
            norm = norm.pow(norm_type)
            dist.all_reduce(norm, group=group(mpu))
            norm = norm.pow(1.0 / norm_type)
    return norm


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2,
    mpu: Any = None,
) -> torch.Tensor:
    """Scale gradients so that their common norm is at most ``max_norm``; return the norm before.

    Args:
        parameters: params whose ``grad`` is scaled in place; those without one are left out.
        max_norm: the limit.
        norm_type: 2, another exponent, or inf.
        mpu: a client's model-parallel unit, over whose ranks the norm is combined.

    Returns:
        The norm, a 0-dim tensor on the gradients' device.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    params = [param for param in params if param.grad is not None]
    if not params:
        return torch.zeros((), device="cpu")
    norm_type = float(norm_type)
    grads = [param.grad for param in _counted(params, mpu) if param.grad is not None]
    total = _over_model(_norms(grads, norm_type), norm_type, mpu)
    if _has_experts(params) and dist.is_initialized():
        # experts' gradients differ between data-parallel ranks; shared params need one factor
        from deepspeed.utils import groups

        total = total / groups._get_data_parallel_world_size()
        dist.all_reduce(total, group=groups._get_data_parallel_group())
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    for param in params:
        assert param.grad is not None
        param.grad.detach().mul_(factor.to(param.grad.device))
    return total


def get_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2, mpu: Any = None
) -> float:
    """Return the norm of the gradients; -1 when it is infinite or not a number."""
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [param.grad for param in _counted(params, mpu) if param.grad is not None]
    norm = float(_over_model(_norms(grads, float(norm_type)), float(norm_type), mpu))
    return norm if math.isfinite(norm) else -1.0


def get_weight_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2, mpu: Any = None
) -> float:
    """Return the norm of the params themselves; -1 when it is infinite or not a number."""
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm = _norms(_counted(params, mpu), float(norm_type))
    value = float(_over_model(norm, float(norm_type), mpu))
    return value if math.isfinite(value) else -1.0


def get_flattened_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2,
    mpu: Any = None,
    grad_norm_mask: Any = None,
) -> float:
    """`get_grad_norm` of flat params.

    Raises:
        NotImplementedError: ``grad_norm_mask`` was given.
    """
    if grad_norm_mask is not None:
        raise NotImplementedError(explain("grad_norm_mask is not built yet"))
    return get_grad_norm(parameters, norm_type, mpu)


def get_global_norm(norm_list: Iterable[float]) -> float:
    """Return the 2-norm of a whole from the 2-norms of its parts."""
    return math.sqrt(sum(norm**2 for norm in norm_list))


def get_global_norm_of_tensors(
    input_tensors: Sequence[torch.Tensor],
    norm_type: float = 2,
    mpu: Any = None,
    moe_ep_group: Any = None,
) -> torch.Tensor:
    """Return the norm of tensors together, combined over the mpu's and the experts' ranks."""
    norm_type = float(norm_type)
    norm = _over_model(_norms(list(input_tensors), norm_type), norm_type, mpu)
    if moe_ep_group is not None:
        op = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
        powered = norm if norm_type == math.inf else norm.pow(norm_type)
        dist.all_reduce(powered, op=op, group=moe_ep_group)
        norm = powered if norm_type == math.inf else powered.pow(1.0 / norm_type)
    return norm


def clip_tensors_by_global_norm(
    input_tensors: Sequence[torch.Tensor],
    max_norm: float = 1.0,
    global_norm: float | torch.Tensor | None = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> float | torch.Tensor:
    """Scale tensors in place so that their common 2-norm is at most ``max_norm``; return the norm."""
    if global_norm is None:
        global_norm = get_global_norm_of_tensors(input_tensors, mpu=mpu)
    factor = max_norm / (float(global_norm) + eps)
    if factor < 1:
        for tensor in input_tensors:
            tensor.detach().mul_(factor)
    return global_norm


def get_grad_zeros(parameters: Iterable[torch.Tensor], mpu: Any = None) -> float:
    """Return how many elements of the gradients are zero."""
    grads = [param.grad for param in _counted(parameters, mpu) if param.grad is not None]
    count = torch.tensor(
        float(sum(grad.numel() - int(grad.count_nonzero()) for grad in grads)), device="cpu"
    )
    return float(_over_model(count, 1.0, mpu))


class CheckOverflow:
    """Looks for gradients that are infinite or not numbers, over all ranks that share the model.

    Args:
        param_groups: lists of params.
        mpu: a client's model-parallel unit.
        zero_reduce_scatter: gradients are split over all ranks: ask all of them.
        deepspeed: accepted for compatibility.
    """

    def __init__(
        self,
        param_groups: Sequence[Iterable[torch.Tensor]] | None = None,
        mpu: Any = None,
        zero_reduce_scatter: bool = False,
        deepspeed: Any = None,
    ) -> None:
        self.mpu = mpu
        self.params = [param for group in param_groups or [] for param in group]
        self.zero_reduce_scatter = zero_reduce_scatter
        self.deepspeed = deepspeed

    def check(self, param_groups: Sequence[Iterable[torch.Tensor]] | None = None) -> bool:
        """Say whether any gradient of the params (or of the given groups) overflowed."""
        if param_groups is None:
            return self.has_overflow(self.params)
        return self.has_overflow([param for group in param_groups for param in group])

    def has_overflow_serial(self, params: Iterable[torch.Tensor]) -> bool:
        """Say whether any gradient on this rank overflowed."""
        return any(bool(has_inf_or_nan(param.grad)) for param in params if param.grad is not None)

    def has_overflow(
        self, params: Sequence[torch.Tensor], has_moe_params: bool | None = None
    ) -> bool:
        """Say whether any gradient overflowed on any rank that shares the model. Collective."""
        found = self.has_overflow_serial(params)
        everybody = self.zero_reduce_scatter or bool(has_moe_params) or _has_experts(params)
        return self._vote(found, everybody)

    def check_using_norm(self, norm_group: Sequence[float], reduce_overflow: bool = True) -> bool:
        """Say whether any of the norms stands for an overflow. Collective of the ranks that share the model, and of
        all ranks with ``reduce_overflow`` or experts."""
        everybody = reduce_overflow or _has_experts(self.params)
        return self._vote(any(map(is_invalid_grad_norm, norm_group)), everybody)

    def _vote(self, found: bool, everybody: bool) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return found
        flag = torch.tensor([float(found)], device=get_accelerator().current_device_name())
        if everybody:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        else:
            flag = _over_model(flag, math.inf, self.mpu)
        return bool(flag.item())

    @staticmethod
    def _has_inf_or_nan(x: torch.Tensor, i: Any = None) -> torch.Tensor:
        return has_inf_or_nan(x)


def _has_experts(params: Iterable[torch.Tensor]) -> bool:
    return any(not getattr(param, "allreduce", True) for param in params)
