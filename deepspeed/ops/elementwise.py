# SPDX-License-Identifier: Apache-2.0
"""`ElementwiseOptimizer`: a torch optimizer whose rule looks at each element alone.

Such a rule runs as well on a flat shard of many params as on one param, which is all that ZeRO asks of
an optimizer (`step_shard`). Subclasses say which moments they keep and what one step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepspeed.ops import pages
from deepspeed.utils.errors import explain


class ElementwiseOptimizer(torch.optim.Optimizer):
    """Base of the native optimizers: state, step and state dicts, without the rule.

    Attributes:
        fp32_optimizer_states: the moments are fp32 for params of 16 bits too; else of the param's dtype.
    """

    # Names of the moments, each a tensor like the param; beside them the state holds the int "step".
    moments: ClassVar[tuple[str, ...]] = ()
    # Attributes that a pickle or copy carries beside torch's own.
    settings: ClassVar[tuple[str, ...]] = ("fp32_optimizer_states",)
    # Whether `step` refuses params on a device; `step_shard` takes them: a part of the states may stay there.
    host_only: ClassVar[bool] = False

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], fp32_optimizer_states: bool = True
    ) -> None:
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every param that has a gradient; returns the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params if self.host_only else ():
                require_cpu(param, type(self).__name__)
            for param in self._step_together(group, params):
                self._step_one(group, param, param.grad, None, 1.0)
        return loss

    def step_shard(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        low: Tensor | None = None,
        grad_scale: float = 1.0,
    ) -> None:
        """Make one step of one param, or of one flat shard that stands in its place.

        Args:
            group: the param group that the hyperparameters are read from.
            param: updated in place; its state is kept in ``self.state[param]``.
            grad: gradient of as many elements, in fp32, bf16 or fp16.
            low: also receives the new param, rounded to its dtype.
            grad_scale: the gradient used is ``grad * grad_scale``.
        """
        with torch.no_grad():
            self._step_one(group, param, grad, low, grad_scale)

    def step_pieces(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        pieces: Iterable[tuple[int, Tensor]],
        grad_scale: float = 1.0,
    ) -> None:
        """Make one step of one flat shard, piece by piece; arguments as of `step_shard` but for one.

        Args:
            pieces: for each piece where it begins, and what receives the new values in place of ``low``; together
                all of the shard.
        """
        state = self._state_of(param)
        with torch.no_grad():
            # a rule may have its moments still to make; and a step of nothing counts, too
            if any(name not in state for name in self.moments) or not param.numel():
                self._step_one(group, param, grad, None, grad_scale)
                for start, low in pieces:
                    low.copy_(param.narrow(0, start, low.numel()))
                return
            counts = {name: value for name, value in state.items() if name not in self.moments}
            for start, low in pieces:
                values, gradient, *moments = (
                    whole.narrow(0, start, low.numel())
                    for whole in (param, grad, *(state[name] for name in self.moments))
                )
                piece = counts | dict(zip(self.moments, moments, strict=True))
                self._apply(group, values, gradient, piece, low, grad_scale)
            state.update((name, piece[name]) for name in counts)
        torch.autograd.graph.increment_version(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; the moments keep the dtype they were saved in.

        torch casts them to the dtype of the param, which would cut the fp32 moments of a bf16 param.
        """
        seen: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, given: seen.append(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = seen[0]
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(ids, params, strict=True):
            old = saved["state"].get(index, {})
            for name in self.moments:
                if isinstance(old.get(name), Tensor):
                    self.state[param][name] = old[name].to(param.device)
            if isinstance(old.get("step"), Tensor):
                self.state[param]["step"] = int(old["step"])

    def _step_together(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Step what one launch can serve; returns the params that are still to be stepped."""
        return params

    def _step_one(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        low: Tensor | None,
        grad_scale: float,
    ) -> None:
        self._apply(group, param, grad, self._state_of(param), low, grad_scale)
        # Kernels write through plain pointers: tell autograd, as torch's own in-place steps do.
        torch.autograd.graph.increment_version(param)

    def _apply(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        low: Tensor | None,
        grad_scale: float,
    ) -> None:
        """Update param and state by the rule."""
        raise NotImplementedError

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            self._init_state(param, state)
        return state

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = 0
        for name in self.moments:
            state[name] = self._new_moment(param)

    def _new_moment(self, param: Tensor) -> Tensor:
        wide = self.fp32_optimizer_states and param.dtype != torch.float64
        return _zeros_like(param, torch.float32 if wide else param.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # torch's pickle holds the groups and the state only.
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.settings}}


def _zeros_like(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros of the param's shape and strides, pinned where the param is."""
    # Asking whether memory is pinned would start CUDA; without CUDA nothing can be pinned.
    pinned = param.is_cpu and torch.cuda.is_initialized() and param.is_pinned()
    if param.is_cpu and not pinned and param.is_contiguous():
        flat = pages.zeros(param.numel(), dtype)
        # Not a view: one keeps the flat tensor, and its memory, alive when the state is moved elsewhere.
        return flat.new_empty(0).set_(flat.untyped_storage(), 0, param.shape, param.stride())
    return torch.zeros_like(param, dtype=dtype, pin_memory=pinned, requires_grad=False)


def require_cpu(param: Tensor, name: str) -> None:
    """Raise AssertionError (the public contract's type) unless the param lives in the CPU's memory."""
    if not param.is_cpu:
        raise AssertionError(
            explain(
                f"{name} updates params in the CPU's memory only",
                got=f"a param on {param.device}",
                expected="cpu",
                fix="Use the fused optimizer for params on a device, or offload_optimizer.",
            )
        )
