# SPDX-License-Identifier: Apache-2.0
"""bf16 and fp16 products of an owned model, sent through fp32 where this CPU has no fast path for them.

torch multiplies low-precision matrices by naive loops on CPUs without AVX512-BF16, AVX512-FP16 or the like: 3 to 40
times slower than in fp32. A model that an engine owns computes them through fp32 instead (product_calls), at least
as accurately; every other model in the process is left alone. For the engine:

    products = products_context(module, device)     # after the cast; does nothing where nothing is needed
    with products:                                  # around forward; backward needs nothing
        loss = module(batch)
    products.release()                              # engine.destroy(), engine.compile()

It wraps ``forward`` of the module and its submodules, so a call of any of them, by whomever, is covered. Copies
and pickles of the module carry no wrapper. DS_LOWP_PRODUCTS=0 turns it off, 1 forces it on any CPU.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deepspeed.utils import env
from deepspeed.utils.errors import explain

from . import product_calls

_SUPPORT = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
_WORDS = {
    "auto": "auto",
    "": "auto",
    "1": "on",
    "on": "on",
    "true": "on",
    "yes": "on",
    "0": "off",
    "off": "off",
    "false": "off",
    "no": "off",
}


# ------------------------------------------------------------------ is it needed here
def native(dtype: torch.dtype) -> bool:
    """Say whether torch has fast products of ``dtype`` on this CPU (oneDNN's word; it obeys ONEDNN_MAX_CPU_ISA)."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return bool(getattr(torch.ops.mkldnn, _SUPPORT[dtype])())
    except (AttributeError, RuntimeError):  # an op that this build of torch does not have
        return False


def lacking(dtypes: Iterable[torch.dtype | None]) -> frozenset[torch.dtype]:
    """Return those of ``dtypes`` whose CPU products are to go through fp32.

    Args:
        dtypes: any; others than bf16 and fp16 are never returned.

    Raises:
        ValueError: DS_LOWP_PRODUCTS is no switch.
    """
    text = env.DS_LOWP_PRODUCTS.get()
    mode = _WORDS.get((text or "").strip().lower())
    if mode is None:
        raise ValueError(
            explain(
                f"environment variable {env.DS_LOWP_PRODUCTS.name} cannot be read",
                got=repr(text),
                expected="0 (never), 1 (always) or auto",
                fix="Unset it or correct it.",
            )
        )
    if mode == "off":
        return frozenset()
    return frozenset(d for d in dtypes if d in _SUPPORT and (mode == "on" or not native(d)))


# ------------------------------------------------------------------ the mode
# torch 2.3 does not tell whether saved tensors are hooked: there the call stack is always looked at
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_CHECKPOINTS = "torch.utils.checkpoint"


class _Mode(TorchFunctionMode):
    """While entered on this thread, products of ``dtypes`` go through fp32; all other calls pass."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = product_calls.HANDLERS.get(func)
        if handler is None or torch.compiler.is_compiling() or product_calls.transformed():
            return func(*args, **kwargs) if kwargs else func(*args)
        if _top_hooks(False) is not None:
            _follow_recomputation(self)
        return handler(self.dtypes, func, args, kwargs or {})


def _entered() -> bool:
    """Say whether this thread is in the mode now (torch takes a mode off while it answers)."""
    return any(
        isinstance(torch._C._get_function_stack_at(i), _Mode)
        for i in range(torch._C._len_torch_function_stack())
    )


class _Entries(threading.local):
    """For each ``with`` block of a Products that this thread is in, whether it entered the mode."""

    def __init__(self) -> None:
        self.stack: list[bool] = []


_entries = _Entries()


# ------------------------------------------------------------------ checkpointing
# [Note: checkpointing]
# A recomputation runs inside backward, where no mode is on. Where it calls a module of ours (both kinds of
# torch.utils.checkpoint, nearly always) that module's wrapper enters the mode again. Left are functions of bare
# tensors. Under the non-reentrant kind a different set of saved tensors would be an error, so a product inside such a
# region makes the region's recomputation enter the mode. Under the reentrant kind torch gives no handle: those bare
# products are recomputed as torch does, right but slow.
class _Recomputation:
    """A region's recompute function that enters the mode its forward ran in."""

    def __init__(self, mode: _Mode, recompute: Callable[..., Any]) -> None:
        self.mode = mode
        self.recompute = recompute

    def __call__(self, *args: Any) -> Any:
        if _entered():
            return self.recompute(*args)
        with self.mode:
            return self.recompute(*args)


def _follow_recomputation(mode: _Mode) -> None:
    """Where non-reentrant checkpoints are to save what is saved now, have their recomputations enter ``mode``."""
    for region in _regions():
        recompute = getattr(region, "recompute_fn", None)
        if recompute is not None and not isinstance(recompute, _Recomputation):
            region.recompute_fn = _Recomputation(mode, recompute)


def _regions() -> Iterator[Any]:
    """Yield torch's records of the non-reentrant checkpoints that this call stack is inside of.

    torch has no door to them: they are locals of the generator that each ``checkpoint`` on the stack drives.
    """
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_name == "checkpoint" and "gen" in caller.f_locals:
            generator = getattr(caller.f_locals["gen"], "gi_frame", None)
            if generator is not None and generator.f_globals.get("__name__") == _CHECKPOINTS:
                yield generator.f_locals.get("new_frame")
        caller = caller.f_back


# ------------------------------------------------------------------ ownership
class _Entering:
    """A module's ``forward`` that runs in the mode; copies and pickles of the module get the plain one."""

    def __init__(self, mode: _Mode, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = forward
        self.mode = mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _entered():
            return self.__wrapped__(*args, **kwargs)
        with self.mode:
            return self.__wrapped__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        forward = self.__wrapped__
        if isinstance(forward, MethodType):
            return getattr, (forward.__self__, forward.__func__.__name__)
        return functools.partial, (forward,)


_WITH_PRODUCTS = frozenset(f"torch.nn.modules.{name}" for name in ("linear", "conv", "rnn"))


def _computes(module: nn.Module) -> bool:
    """Say whether calling ``module`` may multiply: not torch's own leaves (norms, activations) nor bare containers."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule) or kind.forward is nn.Module.forward:
        return False
    if kind.__module__.startswith("torch.nn.modules.") and not module._modules:
        return kind.__module__ in _WITH_PRODUCTS
    return True


class Products:
    """One owned model: its wrapped submodules, and the mode they run in. A context manager, to be entered often.

    Inside a ``with`` block the products of this thread go through fp32; nesting is fine.
    """

    def __init__(self, module: nn.Module, dtypes: frozenset[torch.dtype]) -> None:
        self._mode = _Mode(dtypes) if dtypes else None
        self._owned: list[nn.Module] = []
        if self._mode is None:
            return
        for part in module.modules():
            if _computes(part) and not isinstance(part.forward, _Entering):
                part.forward = _Entering(self._mode, part.forward)
                self._owned.append(part)

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The storage dtypes whose products go through fp32; empty where nothing is to be done."""
        return self._mode.dtypes if self._mode is not None else frozenset()

    def __enter__(self) -> Products:
        fresh = self._mode is not None and not _entered() and not torch.compiler.is_compiling()
        if fresh:
            self._mode.__enter__()
        _entries.stack.append(fresh)
        return self

    def __exit__(self, *exception: Any) -> None:
        if _entries.stack.pop():
            self._mode.__exit__(*exception)

    def release(self) -> None:
        """Give the modules their own ``forward`` back; calling it again is fine."""
        for part in self._owned:
            entering = part.__dict__.get("forward")
            if isinstance(entering, _Entering) and entering.mode is self._mode:
                del part.forward
                plain = entering.__wrapped__
                if (
                    getattr(plain, "__func__", None) is not type(part).forward
                ):  # the user's own, set on the instance
                    part.forward = plain
        self._owned.clear()


def products_context(
    module: nn.Module, device: torch.device, dtypes: Iterable[torch.dtype | None] = ()
) -> Products:
    """Send the low-precision CPU products of ``module`` through fp32, where this CPU lacks a fast path for them.

    Args:
        module: the model, already in its storage dtype.
        device: where it computes; nothing is done but on the CPU.
        dtypes: dtypes it computes in besides those of its params and buffers (autocast's).

    Returns:
        The handle to enter and release; it does nothing where nothing is needed.

    Raises:
        ValueError: DS_LOWP_PRODUCTS is no switch.
    """
    if torch.device(device).type != "cpu":
        return Products(module, frozenset())
    stored = {t.dtype for t in (*module.parameters(), *module.buffers())}
    return Products(module, lacking(stored.union(dtypes)))
