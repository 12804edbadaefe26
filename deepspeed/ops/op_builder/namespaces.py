# SPDX-License-Identifier: Apache-2.0
"""What the legacy builders load: the functions of upstream's compiled modules, over our ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops import cuda_optim
from deepspeed.ops.rules import adagrad_step, adam_rollback, adam_step, lion_step
from deepspeed.utils.logging import logger


def cpu_adam() -> SimpleNamespace:
    """Return create_adam, adam_update, adam_rollback, destroy_adam, and zenflow_adam_* for a process of its own."""
    from deepspeed.ops.adam import zenflow_worker

    decoupled: dict[int, bool] = {}

    def create_adam(
        optimizer_id: int,
        alpha: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0,
        adamw_mode: bool = True,
        should_log: bool = False,
    ) -> int:
        decoupled[optimizer_id] = bool(adamw_mode)
        if should_log:
            logger.info("Adam on the CPU: %s, lr=%g", adam_step.route().reason, alpha)
        return 0

    def through(op: Callable[..., None]) -> Callable[..., int]:
        def update(
            optimizer_id: int,
            step: int,
            lr: float,
            beta1: float,
            beta2: float,
            eps: float,
            weight_decay: float,
            bias_correction: bool,
            params: Tensor,
            grads: Tensor,
            exp_avg: Tensor,
            exp_avg_sq: Tensor,
        ) -> int:
            tensors = (params.detach(), exp_avg, exp_avg_sq, grads, None)
            rule = (lr, beta1, beta2, eps, weight_decay, int(step), decoupled[optimizer_id])
            with torch.no_grad():
                op(*tensors, *rule, bool(bias_correction), 1.0)
            return 0

        return update

    return SimpleNamespace(
        create_adam=create_adam,
        adam_update=through(adam_step),
        adam_rollback=through(adam_rollback),
        destroy_adam=_forget(decoupled),
        zenflow_adam_create=lambda adam, cores: zenflow_worker.create(decoupled[adam], cores),
        zenflow_adam_register_group=zenflow_worker.register_group,
        zenflow_adam_destroy=zenflow_worker.destroy,
        zenflow_adam_ctrl_size=zenflow_worker.control_size,
        zenflow_adam_ctrl_init=zenflow_worker.control_init,
        zenflow_adam_run_worker=zenflow_worker.run_worker,
        zenflow_adam_submit=zenflow_worker.submit,
        zenflow_adam_wait=zenflow_worker.wait,
        zenflow_adam_ctrl_exit=zenflow_worker.control_exit,
    )


def cpu_adagrad() -> SimpleNamespace:
    """Return create_adagrad, adagrad_update and destroy_adagrad."""

    def adagrad_update(
        optimizer_id: int,
        step: int,
        lr: float,
        eps: float,
        weight_decay: float,
        params: Tensor,
        grads: Tensor,
        exp_avg_sq: Tensor,
    ) -> int:
        with torch.no_grad():
            adagrad_step(params.detach(), exp_avg_sq, grads, None, lr, eps, weight_decay, 1.0)
        return 0

    known: dict[int, bool] = {}
    return SimpleNamespace(
        create_adagrad=_remember(known),
        adagrad_update=adagrad_update,
        destroy_adagrad=_forget(known),
    )


def cpu_lion() -> SimpleNamespace:
    """Return create_lion, lion_update and destroy_lion."""

    def lion_update(
        optimizer_id: int,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        params: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
    ) -> int:
        with torch.no_grad():
            lion_step(params.detach(), exp_avg, grads, None, lr, beta1, beta2, weight_decay, 1.0)
        return 0

    known: dict[int, bool] = {}
    return SimpleNamespace(
        create_lion=_remember(known), lion_update=lion_update, destroy_lion=_forget(known)
    )


def fused_adam() -> SimpleNamespace:
    """Return multi_tensor_adam, on lists of tensors of any device."""

    def multi_tensor_adam(
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: int,
        mode: int,
        bias_correction: int,
        weight_decay: float,
    ) -> None:
        # Upstream's mode 1 is AdamW, mode 0 adds the decay to the gradient.
        rule = (lr, beta1, beta2, epsilon, weight_decay, int(step), mode == 1)
        lists = cuda_optim.TensorLists(*_detached(tensor_lists))
        numbers = cuda_optim.AdamRule(*rule, bool(bias_correction))
        if cuda_optim.multi_tensor_adam(lists, numbers, _unless(noop_flag)) or noop_flag.item():
            return
        with torch.no_grad():
            for grad, param, exp_avg, exp_avg_sq in zip(*tensor_lists, strict=True):
                adam_step(
                    param.detach(),
                    exp_avg,
                    exp_avg_sq,
                    grad,
                    None,
                    *rule,
                    bool(bias_correction),
                    1.0,
                )

    return SimpleNamespace(multi_tensor_adam=multi_tensor_adam)


def fused_lion() -> SimpleNamespace:
    """Return multi_tensor_lion, on lists of tensors of any device."""

    def multi_tensor_lion(
        chunk_size: int,
        noop_flag: Tensor,
        tensor_lists: list[list[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        step: int,
        weight_decay: float,
    ) -> None:
        lists = cuda_optim.TensorLists(*_detached(tensor_lists))
        gradients, betas = _unless(noop_flag), (beta1, beta2)
        served = cuda_optim.multi_tensor_lion(lists, lr, betas, weight_decay, gradients)
        if served or noop_flag.item():
            return
        with torch.no_grad():
            for grad, param, exp_avg in zip(*tensor_lists, strict=True):
                lion_step(param.detach(), exp_avg, grad, None, lr, beta1, beta2, weight_decay, 1.0)

    return SimpleNamespace(multi_tensor_lion=multi_tensor_lion)


def _detached(tensor_lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return the lists in the order of `TensorLists`: params before gradients, then the moments."""
    grads, params, *moments = tensor_lists
    return [[param.detach() for param in params], grads, *moments]


def _unless(noop_flag: Tensor) -> cuda_optim.Gradients:
    return cuda_optim.Gradients(noop=noop_flag.to(torch.int32))


def fused_lamb() -> SimpleNamespace:
    """Return lamb, on tensors of any device."""
    from deepspeed.ops.lamb.fused_lamb import lamb_step

    return SimpleNamespace(lamb=torch.no_grad()(lamb_step))


def async_io() -> ModuleType:
    """Return the module with aio_handle, aio_read, aio_write and deepspeed_memcpy."""
    return importlib.import_module("deepspeed.ops.aio.async_io_op")


def pin_memory() -> ModuleType:
    """Return the module with pin_handle."""
    return importlib.import_module("deepspeed.ops.pin_memory.pin_memory_op")


def utils() -> SimpleNamespace:
    """Return cast_to_byte_tensor."""

    def cast_to_byte_tensor(source: Any) -> Any:
        if isinstance(source, Tensor):
            return source.detach().reshape(-1).view(torch.uint8)
        return [cast_to_byte_tensor(item) for item in source]

    return SimpleNamespace(cast_to_byte_tensor=cast_to_byte_tensor)


def evoformer_attn() -> SimpleNamespace:
    """Return attention and attention_bwd."""
    from deepspeed.ops.deepspeed4science.evoformer_attn import attention, attention_bwd

    return SimpleNamespace(attention=attention, attention_bwd=attention_bwd)


def _remember(known: dict[int, bool]) -> Callable[..., int]:
    def create(optimizer_id: int, *settings: Any, **named: Any) -> int:
        known[optimizer_id] = True
        return 0

    return create


def _forget(known: dict[int, bool]) -> Callable[[int], int]:
    def destroy(optimizer_id: int) -> int:
        known.pop(optimizer_id, None)
        return 0

    return destroy
