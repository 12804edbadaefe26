# SPDX-License-Identifier: Apache-2.0
"""The engine's side of torch.compile, and of DeepCompile, which puts ZeRO's work into the graphs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain


class CompileControl:
    """Mixed into the engine.

    Attributes:
        deepcompile: what runs passes over the module's graphs; None where nothing does.
    """

    _is_compiled = False
    deepcompile: Any = None

    def compile(
        self,
        backend: str | None = None,
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the module in place with `torch.compile`; a second call does nothing.

        Args:
            backend: of `torch.compile`; None is the accelerator's.
            compile_kwargs: further arguments of `torch.compile`.
            schedule: for DeepCompile, `(global step, passes)` pairs; None is the ZeRO stage's.
            compiled_autograd_enabled: must be False.

        Raises:
            RuntimeError: if this torch cannot compile.
            NotImplementedError: for compiled autograd, for a schedule without `compile.deepcompile`, and for passes that
                do not go together.
            ValueError: if `compile.passes` is for another ZeRO stage.
        """
        if self._is_compiled:
            return
        self._refuse_compile(schedule, compiled_autograd_enabled)
        engine: Any = self
        # The hooks look at autograd from outside; traced into the module they would break its graph and warn.
        engine._hook_module(torch.compiler.disable)
        chosen: Any = backend or get_accelerator().get_compile_backend()
        if self.is_deepcompile_enabled():
            from deepspeed.compile.session import start

            self.deepcompile = start(engine, chosen, schedule)
            chosen = chosen if self.deepcompile is None else self.deepcompile.backend or chosen
        engine.module.compile(**{"backend": chosen, **(compile_kwargs or {})})
        engine._products.release()
        self._is_compiled = True

    def _refuse_compile(self, schedule: Any, autograd: bool) -> None:
        if not hasattr(torch, "compile") or not hasattr(torch.nn.Module, "compile"):
            raise RuntimeError(
                explain("compile is not supported by this torch", got=str(torch.__version__))
            )
        if autograd or (schedule is not None and not self.is_deepcompile_enabled()):
            raise NotImplementedError(
                explain(
                    "compiled autograd is not available"
                    if autograd
                    else "a schedule of passes needs DeepCompile",
                    got="compiled_autograd_enabled=True" if autograd else "compile(schedule=...)",
                    fix="leave it out, or set compile.deepcompile to true for a schedule",
                )
            )

    @property
    def is_compiled(self) -> bool:
        return self._is_compiled

    def is_deepcompile_enabled(self) -> bool:
        """Whether the configuration asks for it."""
        config: Any = self
        return bool(config._config.compile_config.deepcompile)

    def is_deepcompile_active(self) -> bool:
        """Whether passes run over the module's graphs."""
        return self.deepcompile is not None

    def _set_deepcompile_active(self, active: bool) -> None:
        if not active and self.deepcompile is not None:
            self.deepcompile.stop()
            self.deepcompile = None

    def _around_graphs(self) -> contextlib.AbstractContextManager[None]:
        if self.deepcompile is None:
            return contextlib.nullcontext()
        engine: Any = self
        return self.deepcompile.forward(engine.global_steps)

    def get_compile_time(self) -> list[tuple[int, float]]:
        """For each of DeepCompile's graphs its number and the seconds that compiling took."""
        return [] if self.deepcompile is None else self.deepcompile.times

    def register_compile_pass(self, name: str, opt_pass_fn: Any, contract: Any = None) -> None:
        """Make a pass over DeepCompile's graphs known by a name, for `compile(schedule=...)`.

        Args:
            name: what schedules call it.
            opt_pass_fn: edits a graph in place; called as deepspeed/compile/passes tells.
            contract: a `deepspeed.compile.passes.contract.PassContract`; None is no demands.
        """
        from deepspeed.compile.session import register_compile_pass

        register_compile_pass(name, opt_pass_fn, contract)
