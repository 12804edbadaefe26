# SPDX-License-Identifier: Apache-2.0
"""The owner of stage 3's module hooks, under the name that callers know; what an engine without optimizer holds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils.errors import explain

from .init_context import InitContext
from .partition_parameters import GatheredParameters
from .residency import Residency, ResidencyPolicy, WatchedParams
from .utils import is_zero_param

# The name that callers know.
ZeROOrderedDict = WatchedParams


def ensure_zero_ordered_dict(module: Any) -> None:
    """Have reads of a module's parameters by attribute seen; `_original_parameters` keeps what it had at first."""
    own = getattr(module, "_parameters", None)
    if own is None or isinstance(own, ZeROOrderedDict):
        return
    if not hasattr(module, "_original_parameters"):
        module._original_parameters = own
    module._parameters = ZeROOrderedDict(module, own)


class ParamCoordinator:
    """The record of the order of modules, as callers see it.

    Args:
        residency: what keeps the record.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def is_invalid_trace(self) -> bool:
        """Whether the next pass is going to be recorded."""
        return not self._residency.knows_order

    def _invalidate_trace(self) -> None:
        self._residency.forget_order()


class DeepSpeedZeRoOffload(ZeROOptimizer):
    """Keeps a module's parameters sharded, and whole while they are in use; an engine makes it at stage 3.

    Args:
        module: a module whose parameters are to be sharded (or are), or the residency of an engine.
        timers, ds_config, overlap_comm: accepted; nothing of them is needed here.
        zenflow: must be False.
        prefetch_bucket_size: elements that are gathered ahead of use.
        max_reuse_distance: a parameter that is needed again within so many elements is kept.
        max_live_parameters: elements that may be whole at once before looking ahead and keeping stop.
        param_persistence_threshold: parameters of at most so many elements stay whole.
        model_persistence_threshold: all of those together.
        dp_process_group: the ranks to cut over; None is all data-parallel ones.
        offload_param_config: section `offload_param`: where the slices live, "none" or "cpu".
        mpu: object that knows the data-parallel group.
        zero_param_parallel_group: neighbours that share a second copy (hpZ).
        zero_quantized_weights: gathers carry 8-bit codes (qwZ).
        zero_quantized_nontrainable_weights: frozen matrices are kept as codes.

    Raises:
        NotImplementedError: for ZenFlow, and for slices on NVMe, which need an engine.

    Example:
        >>> offload = DeepSpeedZeRoOffload(model, None, None)  # on every rank; then call model(...)
    """

    def __init__(
        self,
        module: torch.nn.Module | Residency,
        timers: Any = None,
        ds_config: Any = None,
        zenflow: bool = False,
        overlap_comm: bool = True,
        prefetch_bucket_size: int = 50_000_000,
        max_reuse_distance: float = 1e9,
        max_live_parameters: float = 1e9,
        param_persistence_threshold: int = 100_000,
        model_persistence_threshold: int = sys.maxsize,
        dp_process_group: Any = None,
        offload_param_config: Any = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
    ) -> None:
        if isinstance(module, Residency):
            residency = module
        else:
            place = str(getattr(offload_param_config, "device", None) or "none").rpartition(".")[2]
            if zenflow or place == "nvme":
                raise NotImplementedError(
                    explain(
                        "DeepSpeedZeRoOffload by itself cannot do this",
                        got="zenflow=True" if zenflow else "slices on NVMe",
                        fix="call deepspeed.initialize" if place == "nvme" else "leave it out",
                    )
                )
            _shard_in_place(
                module,
                InitContext(
                    data_parallel_group=dp_process_group,
                    remote_device=place,
                    dtype=torch.float32,  # not used: each parameter keeps its own
                    mpu=mpu,
                    zero_param_parallel_group=zero_param_parallel_group,
                    zero_quantized_weights=zero_quantized_weights,
                    zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
                ),
            )
            policy = ResidencyPolicy(
                prefetch_numel=int(prefetch_bucket_size),
                max_live_numel=int(max_live_parameters),
                max_reuse_distance=int(max_reuse_distance),
                persist_numel=int(param_persistence_threshold),
                model_persist_numel=int(model_persistence_threshold),
            )
            residency = Residency(module, policy)
        self.residency = residency
        self.module = residency.module
        self.param_coordinator = ParamCoordinator(residency)
        self.param_groups: list[dict[str, Any]] = []
        self.overflow = False

    @property
    def persistent_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters small enough to stay whole between steps."""
        return self.residency.persistent

    @property
    def forward_hooks(self) -> list[Any]:
        """Handles of the module hooks; callers may remove them and assign []."""
        return self.residency.forward_hooks

    @forward_hooks.setter
    def forward_hooks(self, value: list[Any]) -> None:
        self.residency.forward_hooks = value

    @property
    def backward_hooks(self) -> list[Any]:
        """Handles of further hooks."""
        return self.residency.backward_hooks

    @backward_hooks.setter
    def backward_hooks(self, value: list[Any]) -> None:
        self.residency.backward_hooks = value

    def _register_deepspeed_module(
        self, module: torch.nn.Module, count: list[int] | None = None
    ) -> None:
        self.residency.hook(module)

    def partition_all_parameters(self) -> None:
        """Let go of everything that is whole."""
        self.residency.release_all()

    def empty_partition_cache(self) -> None:
        """Let go of everything that is whole."""
        self.residency.release_all()

    def destroy(self) -> None:
        """Remove the module hooks; parameters stay sharded."""
        self.residency.remove_hooks()


def _shard_in_place(module: torch.nn.Module, context: InitContext) -> None:
    """Cut what is whole; each parameter keeps its dtype."""
    for param in module.parameters():
        if not is_zero_param(param):
            context.dtype = param.dtype
            context._shard(param, None)


@contextlib.contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[torch.nn.Module]:
    """Context in which an engine's module is whole and free of stage 3's hooks, to be called many times in a row.

    Args:
        model: an engine of any stage; every rank must enter.

    Yields:
        The module.
    """
    residency = model.residency
    if residency is None:
        yield model.module
        return
    with GatheredParameters(model.module.parameters()):
        residency.remove_hooks()
        try:
            yield model.module
        finally:
            residency.hook(residency.module)
