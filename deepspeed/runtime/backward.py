# SPDX-License-Identifier: Apache-2.0
"""The two entrances to a backward pass: `engine.backward(loss)`, and the user's own `loss.backward()`.

[Note: Plain backward]
For a plain `loss.backward()` nobody tells the engine that a backward pass begins or ends. The first gradient that
reaches an output of the engine's module marks the beginning (it belongs to the outermost graph task, which matters
with reentrant checkpointing), and a callback queued there on the autograd engine marks the end. Division by the number
of accumulated micro-batches happens at the parameters, because outputs may depend on each other and would be divided
twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from deepspeed.utils.errors import explain

from .clock import AccumulationClock
from .zero.residency import tensors_in


class BackwardWatch:
    """Brackets backward passes with the driver's `begin(sync)` and `finish(sync)`.

    `begin` is called before the first gradient, `finish` after the last; `sync` says whether this pass reduces over
    the ranks.

    Args:
        clock: tells boundaries and `no_sync`.
        driver: knows, too, whether every pass reduces, and whether the loss must go through `engine.scale` first.

    Attributes:
        on_output: called in the outermost graph task, when a gradient reaches an output of the module.
    """

    on_output: Callable[[], None] | None = None

    def __init__(
        self,
        clock: AccumulationClock,
        driver: Any,
    ) -> None:
        self.clock = clock
        self._driver = driver
        self._by_engine = False
        self._plain = False
        self._scaled = False
        self._forward_by_engine = False
        self._late_scale: torch.Tensor | None = None
        self._sync = False
        self.allreduce_enabled = True
        self._hooks: list[Any] = []

    @property
    def plain(self) -> bool:
        """Whether a plain `loss.backward()` is under way."""
        return self._plain

    def note_scaled(self) -> None:
        """The next plain backward pass has its loss scaled."""
        self._scaled = True

    def note_forward(self) -> None:
        """The engine was called, whose users know of its loss scale."""
        self._forward_by_engine |= torch.is_grad_enabled()

    def syncs(self) -> bool:
        """Whether a backward pass that began now would reduce over the ranks."""
        if self.clock.unsynchronized or not self.allreduce_enabled:
            return False
        return self._driver.reduces_each_backward or self.clock.at_boundary

    @contextlib.contextmanager
    def engine_backward(self) -> Iterator[None]:
        """The extent of `engine.backward`."""
        self._by_engine = True
        self._start()
        try:
            yield
            self._end()
        finally:
            self._by_engine = self._forward_by_engine = False

    def watch_outputs(self, outputs: Any) -> None:
        """Place the hook of [Note: Plain backward] on the tensors of a module's output."""
        if self._plain and torch._C._current_graph_task_id() == -1:
            self._plain = False  # the last plain backward pass raised, so its end was never called
        for tensor in tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(self._on_output_grad)

    def watch_params(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Divide gradients of plain backward passes by the accumulation count."""
        for param in params:
            if param.requires_grad:
                self._hooks.append(param.register_hook(self.share_of))

    def on_stray_grad(self) -> None:
        """A parameter received a gradient and nothing announced it (the loss bypassed the module's outputs)."""
        if not self._by_engine and not self._plain:
            self._start_plain()

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _start(self) -> None:
        self._sync = self.syncs()
        self.clock.backwards += 1
        self._driver.begin(self._sync)

    def _end(self) -> None:
        self._driver.finish(self._sync)

    def share_of(self, grad: torch.Tensor | None) -> torch.Tensor | None:
        """What a parameter's gradient counts in a plain backward pass; None: as it is, or a graph has taken it already."""
        if self._by_engine or grad is None:
            return None
        self.on_stray_grad()  # before autograd adds this gradient to `.grad`
        share = self.clock.share()
        if self._late_scale is not None:
            return grad * (self._late_scale * share)
        return None if share == 1.0 else grad * share

    def _on_output_grad(self, grad: torch.Tensor) -> None:
        if not self._by_engine and not self._plain:
            self._start_plain(grad)
        if self.on_output is not None:
            self.on_output()

    def _start_plain(self, first: torch.Tensor | None = None) -> None:
        self._late_scale = None
        if self._driver.needs_scale and not self._scaled:
            if first is None or self._forward_by_engine:
                raise RuntimeError(
                    explain(
                        "Loss scaling is required, and backward() was called on a loss that is not scaled",
                        got="fp16 training, which scales its loss",
                        expected="engine.backward(loss), or engine.scale(loss).backward()",
                        fix="use one of these two",
                    )
                )
            # `engine.module` was called, not the engine: gradients are scaled at the parameters
            self._late_scale = self._driver.scale(torch.ones((), device=first.device))
        self._plain = True
        self._start()
        torch.autograd.Variable._execution_engine.queue_callback(self._end_plain)

    def _end_plain(self) -> None:
        self._plain = self._scaled = self._forward_by_engine = False
        self._late_scale = None
        self._end()
