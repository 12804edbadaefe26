# SPDX-License-Identifier: Apache-2.0
"""The op registry: an `Op` joins schema, fake, torch reference and native entry, and picks one once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from deepspeed.ops import native
from deepspeed.utils.logging import logger

# Other libraries (and tests) may define further ops in the same namespace, hence a fragment.
_LIBRARY = torch.library.Library("deepspeed", "FRAGMENT")

# Modules that register ops when they are imported; by name, since they import this one.
_DEFINED_IN = (
    "deepspeed.ops.norms",
    "deepspeed.ops.rules",
    "deepspeed.ops.lamb_rule",
    "deepspeed.ops.copies",
    "deepspeed.ops.group_codes",
    "deepspeed.ops.small_floats",
    "deepspeed.ops.group_quant",
)
# ds_status of csrc/api/ds_api.h
_BAD_VALUE = 2

_UNRESOLVED: Any = object()


class Ulp(NamedTuple):
    """How far a native result may lie from the reference: units in the last place of the largest term.

    The largest term, not the result: where terms cancel, no arithmetic keeps the last places of the difference.
    """

    ulps: int


def no_result(*args: object) -> None:
    """Fake of the ops that only write to their arguments."""


class Route(NamedTuple):
    """How an op runs on the CPU: its name, "native" or "reference" or "broken", and why."""

    name: str
    route: str
    reason: str


class Op:
    """One operator of the namespace ``torch.ops.deepspeed``, callable directly without the dispatcher's cost.

    Args:
        schema: torch schema, e.g. ``"squared_norm(Tensor x) -> Tensor"``.
        reference: the definition of correct, in torch; takes the schema's arguments in order, on any device.
        fake: shapes and dtypes of the result, from the same arguments.
        cpu: symbol of the native library that takes one argument struct, or None.
        pack: turns the arguments into ``(struct bytes, result, whatever must outlive the call)``, or None when only
            the reference can serve them (strided views, dtypes that the library lacks).
        cuda: ``module:function`` that serves the arguments on CUDA tensors, or answers NotImplemented.
        tolerance: how close the native results are to the reference.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        tolerance: Ulp,
        cpu: str | None = None,
        pack: Callable[..., tuple[Any, ...] | None] | None = None,
        cuda: str | None = None,
    ) -> None:
        self.schema = schema
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.tolerance = tolerance
        self.cpu = cpu
        self.pack = pack
        self.cuda = cuda
        self._cuda_function: Callable[..., Any] | None = None
        self._entry: Callable[[bytes], int] | None = _UNRESOLVED
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self, "CompositeExplicitAutograd")
        _register_fake(self.name, fake)
        _OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run the op on tensors; arguments as in the schema, by position.

        Raises:
            native.NativeLibraryError: the native library is there but cannot be used (message: cause and cure).
            ValueError: the arguments do not fit together (sizes, overlapping buffers).
        """
        entry = self._entry
        if entry is _UNRESOLVED:
            entry = self._resolve()
        # args[0] is a tensor in every schema here, and all tensors of a call live on one device.
        if entry is not None and self.pack is not None and args[0].device.type == "cpu":
            packed = self.pack(*args)
            if packed is not None:
                status = entry(packed[0])
                if status:
                    kind = ValueError if status == _BAD_VALUE else RuntimeError
                    raise kind(f"{self.name}: {native.last_error()}")
                return packed[1]
        if self.cuda is not None and args[0].device.type == "cuda":
            done = self.on_cuda(*args)
            if done is not NotImplemented:
                return done
        return self.reference(*args)

    def on_cuda(self, *args: Any) -> Any:
        """Run the op by its CUDA kernel; NotImplemented where none serves these arguments here."""
        if self.cuda is None:
            return NotImplemented
        if self._cuda_function is None:
            module, _, name = self.cuda.partition(":")
            self._cuda_function = getattr(importlib.import_module(module), name)
        return self._cuda_function(*args)

    def route(self) -> Route:
        """Say how the op would run on the CPU, without running it and without raising."""
        if self.cpu is None:
            return Route(self.name, "reference", "no native kernel is written for it")
        status = native.status()
        return Route(self.name, status.route, status.reason)

    def forget(self) -> None:
        """Decide the route anew at the next call (after the library or the forced ISA changed)."""
        self._entry = _UNRESOLVED

    def _resolve(self) -> Callable[[bytes], int] | None:
        entry = None
        if self.cpu is not None:
            library = native.load()
            entry = None if library is None else library.entry(self.cpu)
        route = self.route()
        logger.info("op %s on cpu: %s (%s)", route.name, route.route, route.reason)
        self._entry = entry
        return entry


_OPS: dict[str, Op] = {}


def ops() -> dict[str, Op]:
    """Return every registered op by name."""
    for module in _DEFINED_IN:
        importlib.import_module(module)
    return dict(_OPS)


def routes() -> list[Route]:
    """Return how each op runs on this machine's CPU and why, in the order of registration. Never raises."""
    return [op.route() for op in ops().values()]


def use_isa(name: str) -> None:
    """Run every op from now on by the named path: "avx512", "avx2", "neon", "scalar", "reference" or "auto".

    Raises:
        ValueError: the name is unknown, or this CPU (or this library) lacks the path.
    """
    native.use_isa(name)
    for op in _OPS.values():
        op.forget()


def _register_fake(name: str, fake: Callable[..., Any]) -> None:
    # torch 2.3 has register_fake under its first name only.
    register = getattr(torch.library, "register_fake", None) or torch.library.impl_abstract
    register(f"deepspeed::{name}", fake, lib=_LIBRARY)
