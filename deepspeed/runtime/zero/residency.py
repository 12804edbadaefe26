# SPDX-License-Identifier: Apache-2.0
"""When sharded parameters are whole: module hooks gather before use, let go after it, and look ahead.

[Note: Life of a sharded parameter]
A module's own parameters are gathered before its forward pass and let go after it. A hook on its outputs gathers them
again before its backward pass; they are let go when their gradients have been taken, or (frozen ones) when the gradient
of the module's input is known, or at the latest when the backward pass ends. Letting go only drops a reference, so a
hook that comes too early costs a gather, never a wrong value.

[Note: Looking ahead]
The first complete pass records which modules came in which order. Later passes follow the record: they gather what
comes next while the current module computes, and keep what is needed again soon. A module that the record does not
expect ends the looking ahead for this pass, and the next pass is recorded anew. As every rank runs the same
record, gathers start in one order everywhere; a rank that goes its own way alone would hang in any scheme that gathers
on use, which is what leaf modules are for: they gather all that is below them at once.

[Note: What stays]
Small parameters stay whole between passes. So do those whose slice is all of their values and already where the module
computes (one rank, no offloading to other memory): there, gathering is no more than pointing at the slice, and costs no
memory. Modules that have only parameters that stay are left out of the record, and without gradients their hooks do
next to nothing.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from deepspeed.runtime.compiler import disable, is_compiling

from .blocks import Blocks
from .diagnose import add_hint
from .own_slice import ZeroParamStatus, is_its_slice
from .prefetch import Record
from .saved_weights import SavedWeights
from .sharded_param import finish_gather, in_backward, release, start_gather
from .utils import is_zero_param


@dataclass(frozen=True, kw_only=True)
class ResidencyPolicy:
    """How much is whole, and for how long.

    Attributes:
        prefetch_numel: elements to gather ahead of use.
        max_live_numel: elements that may be whole at once before looking ahead and keeping stop.
        max_reuse_distance: a parameter needed again within so many elements is kept.
        persist_numel: parameters of at most so many elements stay whole between steps.
        model_persist_numel: all of those together.
    """

    prefetch_numel: int = 50_000_000
    max_live_numel: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    persist_numel: int = 100_000
    model_persist_numel: int = 2**63


class Residency:
    """Keeps the parameters of a module tree whole while they are in use.

    Args:
        module: root of the tree; its parameters are sharded.
        policy: how much stays whole.
    """

    def __init__(self, module: torch.nn.Module, policy: ResidencyPolicy) -> None:
        self.module, self.policy = module, policy
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []
        self._modules: list[torch.nn.Module] = []
        self._number: dict[int, int] = {}
        self._params: list[list[torch.nn.Parameter]] = []
        self._owns: list[bool] = []  # whether some are the module's very own, not of one below it
        self._stack: list[int] = []
        self._records = {True: Record(), False: Record()}
        self._record = self._records[False]
        self._open = False
        self.in_graphs = self.computing = False
        self._shells: Any = None
        self.access_kept_out = disable(self.access)
        self._live: dict[int, torch.nn.Parameter] = {}
        self._live_numel = 0
        self._blocks = Blocks()
        self._saved = SavedWeights(disable(self._bring))
        self.hook(module)
        self.persistent = self._choose_persistent()
        everything = dict.fromkeys(p for params in self._params for p in params)
        self._free = {id(p) for p in everything if is_its_slice(p)}
        for param in everything:
            param.ds_persist = param.ds_persist or id(param) in self._free
        self._staying = self._free | {id(p) for p in self.persistent}

    # - which module needs what

    def hook(self, root: torch.nn.Module) -> None:
        """Place the hooks on `root` and what is below it, down to leaf modules, and on what is attached there later."""
        if not self.forward_hooks:
            told = partial(_tell_of_attached, weakref.ref(self))
            self.forward_hooks.append(register_module_module_registration_hook(told))
        self._hook_all(_down_to_leaves(root))

    def attached(self, parent: torch.nn.Module, child: torch.nn.Module) -> None:
        """`parent` got a new submodule: the hooks are placed on it, if it is in this tree."""
        if self.forward_hooks and id(parent) in self._number:
            new = [each for each in _down_to_leaves(child) if id(each) not in self._number]
            self._hook_all(new)

    def _hook_all(self, modules: Iterable[torch.nn.Module]) -> None:
        before, after = disable(self._before), disable(self._after)
        for module in modules:
            number = self._number_of(module)
            is_leaf = getattr(module, "_z3_leaf", False)
            own = module.parameters(recurse=is_leaf)
            self._params[number] = [p for p in own if is_zero_param(p)]
            self._owns[number] = any(is_zero_param(p) for p in module.parameters(recurse=False))
            for inner in module.modules() if is_leaf else [module]:
                _watch_access(inner, self)
            self.forward_hooks += [
                module.register_forward_pre_hook(partial(before, number), with_kwargs=True),
                module.register_forward_hook(partial(after, number), always_call=True),
            ]

    def _number_of(self, module: torch.nn.Module) -> int:
        """The number of a module; one whose hooks were taken off and placed again keeps the one that it had."""
        number = self._number.setdefault(id(module), len(self._modules))
        if number == len(self._modules):
            self._modules.append(module)
            self._params.append([])
            self._owns.append(False)
        return number

    def leave_to_graphs(self, shells: Any) -> None:
        """Compiled graphs gather by themselves between `shells.put()` and `shells.take()`; what other code reads is ours."""
        self.remove_hooks()
        self.in_graphs, self._shells = True, shells
        for module in self.module.modules():
            _watch_access(module, self)

    def take_from_graphs(self) -> None:
        """The end of `leave_to_graphs`."""
        self._shells.take()
        self.in_graphs = False
        self.hook(self.module)

    @contextlib.contextmanager
    def around_graphs(self) -> Iterator[None]:
        """The extent of a forward pass of compiled graphs."""
        staying = {id(p): p for params in self._params for p in params if id(p) in self._staying}
        self._make_whole(list(staying.values()))
        self._shells.put()
        self.computing = True
        try:
            yield
        finally:
            self.computing = False
            if not torch.is_grad_enabled():
                self._end_pass()

    def stays(self, param: torch.nn.Parameter) -> bool:
        """Whether a parameter is whole between passes."""
        return id(param) in self._staying

    def keep_whole(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Have more parameters stay whole between passes."""
        for param in params:
            if id(param) not in self._staying:
                param.ds_persist = True
                self.persistent.append(param)
                self._staying.add(id(param))

    def remove_hooks(self) -> None:
        """Let go of the modules; parameters stay sharded."""
        for hook in (*self.forward_hooks, *self.backward_hooks):
            hook.remove()
        self.forward_hooks, self.backward_hooks = [], []
        for module in self.module.modules():
            _unwatch_access(module)

    def _choose_persistent(self) -> list[torch.nn.Parameter]:
        chosen, total = [], 0
        for param in dict.fromkeys(p for params in self._params for p in params):
            small = param.ds_numel <= self.policy.persist_numel
            if small and total + param.ds_numel <= self.policy.model_persist_numel:
                param.ds_persist = True
                total += param.ds_numel
                chosen.append(param)
        return chosen

    def needs(self, number: int) -> list[torch.nn.Parameter]:
        """Parameters of a module, and those of others that it was seen to use."""
        # Not by getattr: a module without the attribute would take a hundred times as long to say so.
        external = self._modules[number].__dict__.get("_external_params")
        return self._params[number] + list(external.values()) if external else self._params[number]

    def _all_stay(self, params: list[torch.nn.Parameter]) -> bool:
        return all(id(p) in self._staying for p in params)

    # - hooks

    def _before(self, number: int, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not self._stack and not in_backward():
            self._begin_pass()
        self._stack.append(number)
        params = self.needs(number)
        if not params:
            return
        if not torch.is_grad_enabled() and self._all_stay(params):
            self._make_whole(params)
            return
        self._enter(number)
        if not torch.is_grad_enabled():
            return
        if self._owns[number]:
            self._saved.begin(len(self._stack), [p for p in params if id(p) not in self._staying])
        if not all(p.requires_grad for p in params):
            for tensor in tensors_in((args, kwargs)):
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(partial(self._leave_backward, number))

    def _after(self, number: int, module: torch.nn.Module, args: Any, output: Any) -> None:
        if output is None:
            add_hint(sys.exc_info()[1])
        if number in self._stack:
            del self._stack[self._stack.index(number) :]
            self._saved.end(len(self._stack) + 1)
        params = self.needs(number)
        graph = False
        if not torch.is_grad_enabled() and self._all_stay(params):
            params = []
        else:
            for tensor in tensors_in(output):
                if is_zero_param(tensor):
                    self._hand_over(number, tensor)
                elif tensor.requires_grad and torch.is_grad_enabled():
                    graph = True
                    if params:
                        tensor.register_hook(partial(self._enter_backward, number))
        # A recomputation for the backward pass under way may be stopped early, in the middle of a module: no output.
        recomputed = in_backward() and (graph or (output is None and torch.is_grad_enabled()))
        if params and not recomputed:
            self._leave(number, params)
        if not self._stack and not graph and not in_backward():
            self._end_pass()

    def _hand_over(self, number: int, param: torch.nn.Parameter) -> None:
        """A module returns a parameter: whoever called it is going to use it."""
        unregister_external(self._modules[number], param)
        if self._stack:
            caller = self._stack[-1]
            if all(param is not own for own in self._params[caller]):
                register_external(self._modules[caller], param)
            param.ds_active_sub_modules.add(caller)

    def _enter_backward(self, number: int, grad: torch.Tensor) -> None:
        self._enter(number)

    def _leave_backward(self, number: int, grad: torch.Tensor) -> None:
        # Trainable ones are let go when their gradients have been taken: until then autograd compares shapes.
        self._leave(number, [p for p in self.needs(number) if not p.requires_grad])

    def after_grad(self, param: torch.nn.Parameter) -> None:
        """The gradient of a parameter has been taken: its module needs its values no more in this backward pass."""
        if len(param.ds_active_sub_modules) <= 1:
            param.ds_active_sub_modules.clear()
            self._drop([param])

    def begin_backward(self) -> None:
        """A backward pass begins."""
        if self.in_graphs:
            self._shells.put()

    def finish_backward(self) -> None:
        """The backward pass is over: nothing is in use."""
        self._end_pass()

    def access(self, param: torch.nn.Parameter) -> None:
        """A module reads a parameter that is not whole: one that another module owns."""
        if self.computing:
            self._bring(param)  # code between two graphs; the end of the pass lets it go
            return
        if not self._stack or param.ds_status is ZeroParamStatus.AVAILABLE:
            return
        number = self._stack[-1]
        register_external(self._modules[number], param)
        param.ds_active_sub_modules.add(number)
        self._bring(param)
        self._saved.know([param])

    # - passes

    @property
    def knows_order(self) -> bool:
        """Whether the order of some kind of pass is on record."""
        return any(record.complete for record in self._records.values())

    def forget_order(self) -> None:
        """Have the order of modules recorded anew."""
        for record in self._records.values():
            record.forget()

    def _begin_pass(self) -> None:
        if self._open:
            self._end_pass()
        self._open = True
        self._record = self._records[torch.is_grad_enabled()]
        self._record.begin()

    def _end_pass(self) -> None:
        self._open = False
        self._record.end(self._weigh)
        self._stack.clear()
        self._saved.forget()
        for param in self._live.values():
            param.ds_active_sub_modules.clear()
        self._let_go([p for p in self._live.values() if id(p) not in self._staying])
        self._blocks.clear()
        if self.in_graphs:
            self._shells.take()

    def after_step(self) -> None:
        """The slices have changed: gathered copies are stale."""
        self._saved.after_step()
        self._let_go([p for p in self._live.values() if id(p) not in self._free])
        self._make_whole(self.persistent)

    def release_all(self) -> None:
        """Let everything go, persistent parameters too; the next use gathers them again."""
        self._let_go(list(self._live.values()))
        if self.in_graphs:
            self._shells.take()

    def _weigh(self, number: int) -> int:
        return sum(p.ds_numel for p in self.needs(number))

    # - in and out of use

    def _make_whole(self, params: list[torch.nn.Parameter]) -> None:
        if any(p.ds_status is not ZeroParamStatus.AVAILABLE for p in params):
            self._start(params)
            finish_gather(params)

    def _enter(self, number: int) -> None:
        params = self.needs(number)
        for param in params:
            param.ds_active_sub_modules.add(number)
        self._start(params)
        self._record.visit(number)
        self._look_ahead()
        finish_gather(params)

    def _bring(self, param: torch.nn.Parameter) -> None:
        """Make one parameter whole that no module has asked for; the end of the pass lets it go."""
        self._make_whole([param])

    def _look_ahead(self) -> None:
        for number in self._record.window(self.policy.prefetch_numel):
            if self._live_numel >= self.policy.max_live_numel:
                return
            self._start(self.needs(number))
            self._record.looked()

    def _leave(self, number: int, params: list[torch.nn.Parameter]) -> None:
        for param in params:
            param.ds_active_sub_modules.discard(number)
        self._drop(params)

    def _drop(self, params: list[torch.nn.Parameter]) -> None:
        crowded = self._live_numel > self.policy.max_live_numel
        self._let_go(
            p
            for p in params
            if id(p) not in self._staying
            and not p.ds_active_sub_modules
            and (crowded or not self._record.soon(p, self.needs, self.policy.max_reuse_distance))
        )

    def _start(self, params: list[torch.nn.Parameter]) -> None:
        for param in params:
            if id(param) not in self._live:
                self._live[id(param)] = param
                self._live_numel += self._weight_of(param)
        start_gather(params, self._blocks, narrow=True)

    def _let_go(self, params: Iterable[torch.nn.Parameter]) -> None:
        for param in params:
            if self._live.pop(id(param), None) is not None:
                self._live_numel -= self._weight_of(param)
            release([param])

    def _weight_of(self, param: torch.nn.Parameter) -> int:
        """Elements of memory that being whole takes."""
        return 0 if id(param) in self._free else param.ds_numel


def _tell_of_attached(
    place: weakref.ref[Residency], parent: torch.nn.Module, name: str, child: torch.nn.Module | None
) -> None:
    residency = place()
    if residency is not None and child is not None:
        residency.attached(parent, child)


def register_external(module: torch.nn.Module, param: torch.nn.Parameter) -> None:
    """Note that `module` uses `param`, which another module owns."""
    external = module.__dict__.setdefault("_external_params", {})
    external[param.ds_id] = param
    param.is_external_param = True


def unregister_external(module: torch.nn.Module, param: torch.nn.Parameter) -> bool:
    """Forget that `module` uses `param`; False if that was not known."""
    external = module.__dict__.get("_external_params", {})
    return external.pop(param.ds_id, None) is not None


def external_of(module: torch.nn.Module) -> Iterable[tuple[int, torch.nn.Parameter]]:
    """Parameters of other modules that `module` was seen to use, by their `ds_id`."""
    return module.__dict__.get("_external_params", {}).items()


def _down_to_leaves(root: torch.nn.Module) -> Iterator[torch.nn.Module]:
    seen: set[int] = set()

    def walk(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield module
        if not getattr(module, "_z3_leaf", False):
            for child in module.children():
                yield from walk(child)

    yield from walk(root)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclass-like outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))


class WatchedParams(dict):
    """A module's `_parameters` that tells the residency, once it has one, of every read by attribute.

    Args:
        parent_module: the module.
        params: what it holds.
    """

    residency: Residency | None = None

    def __init__(
        self,
        parent_module: torch.nn.Module,
        params: Mapping[str, torch.nn.Parameter | None] | None = None,
    ) -> None:
        super().__init__(params or {})

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        status = getattr(param, "ds_status", None)
        missing = status is not None and status is not ZeroParamStatus.AVAILABLE
        residency = self.residency
        if missing and residency is not None and not (residency.in_graphs and is_compiling()):
            residency.access_kept_out(param)
        return param


def _watch_access(module: torch.nn.Module, residency: Residency) -> None:
    watched = WatchedParams(module, module._parameters)
    watched.residency = residency
    module._parameters = watched
    module.__dict__.setdefault("_external_params", {})
    module.ds_external_parameters = partial(external_of, module)


def _unwatch_access(module: torch.nn.Module) -> None:
    if isinstance(module._parameters, WatchedParams):
        module._parameters = dict(module._parameters)
    module.__dict__.pop("ds_external_parameters", None)
