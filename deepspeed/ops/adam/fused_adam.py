# SPDX-License-Identifier: Apache-2.0
"""`FusedAdam`: Adam and AdamW for params on any device, one fused pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops import cuda_optim
from deepspeed.ops.elementwise import ElementwiseOptimizer
from deepspeed.ops.rules import adam_step
from deepspeed.utils.errors import explain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 1 << 26  # elements: 256 MiB of fp32 for a piece's gradient


class FusedAdam(ElementwiseOptimizer):
    """Adam (AdamW by default) for params on any device.

    CPU params take the native kernel, CUDA params our kernel in one launch a group, or torch's fused kernel
    where ours cannot run. The moments have the param's dtype.

    Args:
        params: params, named params or param groups.
        lr: learning rate.
        bias_correction: divide the moments by ``1 - beta**step``.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        adam_w_mode: decay the params directly (AdamW); else add the decay to the gradient (L2).
        weight_decay: decay of the params.
        amsgrad: must be False.
        set_grad_none: `zero_grad` drops the gradients instead of filling them with zeros.

    Raises:
        RuntimeError: ``amsgrad`` is asked for; at the step, a gradient is sparse or a param is neither
            fp32, bf16 nor fp16.
    """

    moments = ("exp_avg", "exp_avg_sq")
    settings = ("fp32_optimizer_states", "adam_w_mode", "set_grad_none")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam has no AMSGrad variant: construct it with amsgrad=False.")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.set_grad_none = set_grad_none
        super().__init__(params, defaults, fp32_optimizer_states=False)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop or zero the gradients; without an argument as ``set_grad_none`` says."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> Any:
        """Update every param that has a gradient; returns the closure's value.

        The other arguments are those of an older interface and must be None.

        Raises:
            RuntimeError: one of them is given.
        """
        if any(given is not None for given in (grads, output_params, scale, grad_norms)):
            raise RuntimeError(
                "FusedAdam.step takes no grads, output_params, scale or grad_norms any more: "
                "set .grad of the params and unscale before the step."
            )
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, also one that counts the steps of a group on its last param only."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if p in self.state]
            latest = max((state.get("step", 0) for state in states), default=0)
            for state in states:
                # Our own states count from 1; 0 beside moments means "as the others of the group".
                if state.get("step") == 0:
                    state["step"] = latest

    def _step_together(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        def launch(lists: cuda_optim.TensorLists, step: int) -> bool:
            rule = cuda_optim.AdamRule(
                float(group["lr"]),
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                step,
                bool(self.adam_w_mode),
                bool(group["bias_correction"]),
            )
            return cuda_optim.multi_tensor_adam(lists, rule)

        return cuda_optim.step_together(self, params, launch)

    def _apply(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        low: Tensor | None,
        grad_scale: float,
    ) -> None:
        _check(param, grad)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        arguments = (
            param.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            grad,
            low,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            state["step"],
            bool(self.adam_w_mode),
            bool(group["bias_correction"]),
            grad_scale,
        )
        if param.is_cuda and group["bias_correction"]:
            if adam_step.on_cuda(*arguments) is NotImplemented:
                self._apply_cuda(group, param, grad, state, grad_scale)
                if low is not None:
                    low.copy_(param)
            return
        adam_step(*arguments)

    def _apply_cuda(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        grad_scale: float,
    ) -> None:
        """Run torch's fused kernel, which wants one dtype and a step count on the device."""
        beta1, beta2 = group["betas"]
        fused = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        step = torch.full((), float(state["step"]), device=param.device)
        tensors = (param.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
        for weights, gradient, first, second in _pieces(tensors):
            gradient = gradient.to(param.dtype)
            if grad_scale != 1.0:
                gradient = gradient * grad_scale
            fused(
                [weights],
                [gradient],
                [first],
                [second],
                [],
                [step],
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors cut alike, so that what is made of a piece takes little memory; others as they are."""
    if tensors[0].dim() != 1:
        yield tensors
        return
    for start in range(0, tensors[0].numel(), _PIECE):
        length = min(_PIECE, tensors[0].numel() - start)
        yield tuple(tensor.view(-1).narrow(0, start, length) for tensor in tensors)


def _check(param: Tensor, grad: Tensor) -> None:
    if grad.is_sparse:
        raise RuntimeError(
            "FusedAdam takes no sparse gradients: use torch.optim.SparseAdam for them."
        )
    if param.dtype not in _DTYPES:
        raise RuntimeError(
            explain(
                "FusedAdam cannot update the param", got=param.dtype, expected="fp32, bf16 or fp16"
            )
        )
