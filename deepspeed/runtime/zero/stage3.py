# SPDX-License-Identifier: Apache-2.0
"""ZeRO stage 3 under the name and the attributes that callers know."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils.errors import explain
from deepspeed.utils.tensor_fragment import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from deepspeed.utils.z3_leaf_module import get_z3_leaf_modules

from .estimate import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from .grad_norm import square_of_groups
from .optimizer import ZeroOptimizer
from .own_slice import piece_of
from .parameter_offload import DeepSpeedZeRoOffload
from .plan import TierKind

__all__ = [
    "DeepSpeedZeroOptimizer_Stage3",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]


class DeepSpeedZeroOptimizer_Stage3(ZeroOptimizer, ZeROOptimizer):
    """The optimizer wrapper of ZeRO stage 3; see `ZeroOptimizer`."""

    parameter_offload: DeepSpeedZeRoOffload

    @property
    def fp16_groups(self) -> list[list[torch.nn.Parameter]]:
        """Parameters of each group."""
        return [group.params for group in self.groups]

    @property
    def fp16_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """This rank's slices of each group's parameters, as one flat tensor."""
        return [group.own for group in self.groups]

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.nn.Parameter]:
        """This rank's flat master weights."""
        return [part.master for group in self.groups for part in group.parts]

    @property
    def averaged_gradients(self) -> dict[int, Any]:
        """This rank's reduced gradients by group; None where there are none."""
        return {number: group.grads() for number, group in enumerate(self.groups)}

    @property
    def grad_partitions_flat_buffer(self) -> torch.Tensor:
        """A copy of this rank's reduced gradients, one after the other; empty after a step, which frees them."""
        grads = [grad for group in self.groups for grad in group.grads() or ()]
        if not grads:
            return torch.empty(0, device=self.device)
        return torch.cat([grad.to(grads[0].device) for grad in grads])

    @property
    def persistent_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters small enough to stay whole between steps."""
        return self.parameter_offload.persistent_parameters

    @property
    def leaf_parameters(self) -> dict[torch.nn.Module, list[torch.nn.Parameter]]:
        """Modules that gather all that is below them at once, with those parameters."""
        modules = get_z3_leaf_modules(self.parameter_offload.module)
        return {module: list(module.parameters()) for module in modules}

    @property
    def partition_count(self) -> int:
        """Over how many ranks states are sharded."""
        return self.groups[0].shard_axis.size

    @property
    def dp_process_group(self) -> Any:
        """The data-parallel process group."""
        return self.mesh.data.group

    @property
    def swap_optimizer(self) -> bool:
        """Whether states live in files between steps."""
        return self.plan.state_tier is TierKind.FILE

    def _get_norm_groups(self) -> list[torch.Tensor]:
        """2-norm of each group's gradients over all ranks, still multiplied by the loss scale; a collective of them."""
        squares = [square_of_groups([group], self.mesh, self.device) for group in self.groups]
        return [torch.tensor(square, device=self.device).sqrt() for square in squares]

    # - a whole parameter's state, gathered from the ranks; collective

    def get_full_hp_param(
        self, param: torch.nn.Parameter, optim_state_key: str | None = None
    ) -> torch.Tensor | None:
        """The master weight, or a state of its size, in the parameter's shape."""
        if optim_state_key is None:
            return safe_get_full_fp32_param(param)
        return safe_get_full_optimizer_state(param, optim_state_key)

    def set_full_hp_param(
        self, value: torch.Tensor, param: torch.nn.Parameter, optim_state_key: str | None = None
    ) -> None:
        """Set the master weight, or a state of its size."""
        if optim_state_key is None:
            safe_set_full_fp32_param(param, value)
        else:
            safe_set_full_optimizer_state(param, value, optim_state_key)

    def get_fp32_grad_for_param(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        """The reduced gradient in fp32; None where there is none."""
        return safe_get_full_grad(param)

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: torch.nn.Parameter) -> None:
        """Set the gradient that the next step uses."""
        safe_set_full_grad(param, value)

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, torch.Tensor]]:
        """This rank's slices of the reduced gradients in fp32, by group and parameter; flat, padding included."""
        found: dict[int, dict[int, torch.Tensor]] = {}
        for number, group in enumerate(self.groups):
            grads = (self.get_local_fp32_grad_for_param(param) for param in group.params)
            found[number] = {i: grad for i, grad in enumerate(grads) if grad is not None}
        return found

    def _set_fp32_optimizer_param_groups(self) -> None:
        """Nothing to do: the inner optimizer's groups always hold the flat masters."""

    def _clear_fp32_optimizer_param_groups(self) -> None:
        """Nothing to do; see `_set_fp32_optimizer_param_groups`."""

    def checkpoint_event_prologue(self) -> None:
        """Called before the module's own state is read or written: nothing is whole afterwards."""
        self.parameter_offload.empty_partition_cache()

    def checkpoint_event_epilogue(self) -> None:
        """Called after the module's own state was read or written: parameters that stay whole are so again."""
        self.parameter_offload.residency.after_step()

    # - one rank's part of a parameter's state; see deepspeed.utils.safe_get_local_fp32_param and its like

    def get_local_fp32_param(
        self, param: torch.nn.Parameter, optim_state_key: str | None = None
    ) -> torch.Tensor | None:
        """This rank's slice of the master weight, or of a state (None if there is none): flat, padding included."""
        with self.in_memory():
            found = self._local(param, optim_state_key)
            return None if found is None else _joined(found, param.ds_device)

    def get_local_fp32_grad_for_param(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        """This rank's slice of the reduced gradient in fp32; None where there is none."""
        with self._group_of(param).grads_in_memory():
            found = self._local_grad(param)
            return None if found is None else _joined(found, param.ds_device).float()

    def set_local_hp_param(
        self,
        value: torch.Tensor,
        param: torch.nn.Parameter,
        optim_state_key: str | None = None,
    ) -> None:
        """Set this rank's slice of the master weight (the parameter follows), or of a state.

        Raises:
            KeyError: the optimizer keeps no such state (yet).
            ValueError: a value of another size.
        """
        with self.in_memory():
            found = self._local(param, optim_state_key)
            if found is None:
                raise KeyError(explain("the optimizer keeps no such state", got=optim_state_key))
            _fill(found, value)
            if optim_state_key is None:
                self._group_of(param).lower_param(param.param_idx_in_group)

    def set_local_grad_for_param(self, value: torch.Tensor, param: torch.nn.Parameter) -> None:
        """Set this rank's slice of the gradient that the next step uses.

        Raises:
            ValueError: a value of another size.
        """
        with self._group_of(param).grads_in_memory(edit=True):
            found = self._local_grad(param)
            if found is not None:
                _fill(found, value)

    def _group_of(self, param: torch.nn.Parameter) -> Any:
        return self.groups[param._index_in_param_group]

    def _runs(self, param: torch.nn.Parameter) -> list[Any]:
        group = self._group_of(param)
        return group.runs(group.layout.starts[param.param_idx_in_group], piece_of(param))

    def _local(self, param: torch.nn.Parameter, key: str | None) -> list[torch.Tensor] | None:
        found = []
        for part, _, start, length in self._runs(param):
            source = part.master.data
            if key is not None:
                source = self.optimizer.state.get(part.master, {}).get(key)
            if not isinstance(source, torch.Tensor) or source.numel() != part.length:
                return None
            found.append(source.view(-1).narrow(0, start, length))
        return found

    def _local_grad(self, param: torch.nn.Parameter) -> list[torch.Tensor] | None:
        runs = self._runs(param)
        if not all(part.has_grad for part, *_ in runs):
            return None
        return [part.grad.narrow(0, start, length) for part, _, start, length in runs]

    def quantize_nontrainable_params(self) -> None:
        """Nothing to do: with `zero_quantized_nontrainable_weights`, what was frozen at initialize is kept as codes."""

    def empty_partition_cache(self) -> None:
        """Let go of everything that is whole."""
        self.parameter_offload.empty_partition_cache()

    def update_lp_params(self) -> None:
        """Write the master weights into the model."""
        super().update_lp_params()
        self.parameter_offload.residency.after_step()


def _joined(runs: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Consecutive runs in one tensor on the model's device: the states of some may be on the host."""
    return torch.cat([run.to(device) for run in runs])


@torch.no_grad()
def _fill(targets: list[torch.Tensor], value: torch.Tensor) -> None:
    """Copy flat values into consecutive runs."""
    lengths = [target.numel() for target in targets]
    if value.numel() != sum(lengths):
        raise ValueError(
            explain(
                "a value of another size", got=value.numel(), expected=f"{sum(lengths)} elements"
            )
        )
    for target, piece in zip(targets, value.detach().reshape(-1).split(lengths), strict=True):
        target.copy_(piece)
