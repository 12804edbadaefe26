# SPDX-License-Identifier: Apache-2.0
"""What autograd saves of gathered parameters: a note of which one and how it was seen, in place of the memory.

[Note: Saved views]
A linear layer saves its weight transposed, a view that would keep the gathered buffer until the backward pass, although
the parameter has been let go. So while a module computes with gathered parameters, views of them are saved as notes, and
read from the parameter when the backward pass asks, gathered once more if need be. Everything else is saved as it is,
together with the version that torch would have compared. Where others watch what is saved (activation checkpointing,
offloading of activations), the saving is theirs: ours stays out of their way. And where a module reads only the
parameters of others, nothing is watched: a function of the caller's that saves a parameter itself expects that very
parameter back, and torch has only a bare tensor for hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed.utils.errors import explain

from .own_slice import ZeroParamStatus

# torch before 2.7 cannot tell who watches what is saved: there, buffers stay until the backward pass.
_top_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


@dataclass(frozen=True)
class _View:
    """How a saved tensor looks into a gathered parameter.

    Attributes:
        param: the parameter.
        size, stride, offset: of the view; `offset` in elements from the parameter's first.
        steps: how many steps had changed the parameters.
    """

    param: torch.nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    steps: int


class SavedWeights:
    """Watches what autograd saves while modules compute with gathered parameters.

    Args:
        bring: makes a parameter whole for the backward pass under way.
    """

    def __init__(self, bring: Callable[[torch.nn.Parameter], None]) -> None:
        self._bring = bring
        self._steps = 0
        self._homes: dict[int, torch.nn.Parameter] = {}
        self._watch: Any = None
        self._depth = 0

    def begin(self, depth: int, params: Iterable[torch.nn.Parameter]) -> None:
        """A module at `depth` of the stack of modules begins to compute with `params`, which are whole."""
        self.know(params)
        if self._watch is None and _top_hooks is not None and _top_hooks(True) is None:
            self._watch = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self._watch.__enter__()
            self._depth = depth

    def end(self, depth: int) -> None:
        """All modules at `depth` or deeper are done."""
        if self._watch is None or depth > self._depth:
            return
        watch, self._watch = self._watch, None
        assert _top_hooks is not None
        top = _top_hooks(True)
        # An interruption may have left others' hooks above ours; then theirs is the mess, and ours do no harm.
        if top is not None and top[0] == self._pack:
            watch.__exit__()

    def know(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Views of `params` may be saved from now on."""
        for param in params:
            self._homes[param.untyped_storage().data_ptr()] = param

    def forget(self) -> None:
        """The pass is over."""
        self.end(0)
        self._homes.clear()

    def after_step(self) -> None:
        """Trainable parameters have other values now."""
        self._steps += 1

    def _pack(self, tensor: torch.Tensor) -> Any:
        param = self._home_of(tensor)
        if param is None:
            return tensor, tensor._version
        start = param.storage_offset()
        offset = tensor.storage_offset() - start
        return _View(param, tensor.size(), tensor.stride(), offset, self._steps)

    def _home_of(self, tensor: torch.Tensor) -> torch.nn.Parameter | None:
        """The gathered parameter whose memory a tensor shows, if it does."""
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            return None
        place = tensor.untyped_storage().data_ptr()
        param = self._homes.get(place)
        if param is None:
            return None
        # The parameter may be gone by now, and its place another tensor's.
        here = param.ds_status is ZeroParamStatus.AVAILABLE
        if not here or param.untyped_storage().data_ptr() != place:
            del self._homes[place]
            return None
        plain = tensor.dtype == param.dtype and not (tensor.is_conj() or tensor.is_neg())
        return param if plain else None

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, _View):
            return self._look(saved)
        tensor, version = saved
        if tensor._version != version:
            raise RuntimeError(
                explain(
                    "a tensor that the backward pass needs was changed in place",
                    got=f"version {tensor._version} of a {tensor.dtype} tensor of shape {tuple(tensor.shape)}",
                    expected=f"version {version}, which the forward pass computed with",
                    fix="replace the in-place operation, or clone the tensor before it",
                )
            )
        return tensor

    def _look(self, saved: _View) -> torch.Tensor:
        param = saved.param
        if param.requires_grad and saved.steps != self._steps:
            raise RuntimeError(
                explain(
                    "a backward pass goes through weights that a step has changed since the forward pass",
                    got=f"a parameter of shape {tuple(param.ds_shape)}",
                    expected="backward() before step()",
                    fix="compute the loss anew after the step",
                )
            )
        self._bring(param)
        whole = param.detach()
        start = whole.storage_offset() + saved.offset
        return whole.as_strided(saved.size, saved.stride, start)
