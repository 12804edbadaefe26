# SPDX-License-Identifier: Apache-2.0
"""The parameters that compiled graphs work on, as the graphs' operators see them: numbers in place of objects.

[Note: Shells]
A graph is compiled for inputs of certain shapes, and checks them each time. A sharded parameter between its uses has
therefore to look as if it were whole: its `data` is a tensor of the full shape whose storage has no bytes (a shell), and
only the graph's gather node may touch it. Whoever else reads a shell gets torch's error, never wrong values; a module's
own reads of a parameter in code that is not compiled gather it first (residency.py).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import sharded_param
from deepspeed.runtime.zero.own_slice import ZeroParamStatus
from deepspeed.runtime.zero.residency import Residency
from deepspeed.runtime.zero.utils import is_zero_param

from .config import CompileConfig

_graph_ids = itertools.count()
_of_graph: weakref.WeakValueDictionary[int, GraphParams] = weakref.WeakValueDictionary()


def engines() -> list[GraphParams]:
    """What there is, of all engines."""
    return list(dict.fromkeys(_of_graph.values()))


def of_graph(graph_id: int) -> GraphParams:
    """The parameters of the engine that a graph belongs to.

    Raises:
        KeyError: if that engine is gone.
    """
    return _of_graph[graph_id]


class GraphParams:
    """The parameters of one engine.

    Args:
        params: all that its graphs may read.
        reducer: takes gradients; None where nothing is trained.
        residency: keeps some parameters whole; None below stage 3.
        share: called with each gradient before it is taken; its result replaces the gradient unless it is None.
        config: section `compile`.

    Attributes:
        taken: gradients that backward graphs have handed over so far.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        reducer: Any,
        residency: Residency | None,
        share: Callable[[torch.Tensor], torch.Tensor | None],
        config: CompileConfig,
    ) -> None:
        self._by_number: dict[int, Any] = {}
        for index, param in enumerate(params):
            # the number of a sharded parameter is known all over the process; others count downwards
            self._by_number[param.ds_id if is_zero_param(param) else -1 - index] = param
        self._number = {id(p): number for number, p in self._by_number.items()}
        self._reducer, self.residency, self._share = reducer, residency, share
        self._config = config
        self.taken = 0
        self._shells: list[tuple[Any, torch.Tensor]] | None = None

    # - numbers

    def new_graph(self) -> int:
        """A number for one more graph of this engine."""
        graph_id = next(_graph_ids)
        _of_graph[graph_id] = self
        return graph_id

    def number_of(self, tensor: Any) -> int | None:
        """The number of a parameter; None for other tensors."""
        return self._number.get(id(tensor))

    def has(self, number: int) -> bool:
        """Whether a parameter of that number is among these."""
        return number in self._by_number

    def param(self, number: int) -> Any:
        """The parameter of a number."""
        return self._by_number[number]

    def gathers(self, number: int) -> bool:
        """Whether graphs have to gather a parameter: it is sharded, and not whole between passes."""
        param = self._by_number[number]
        if not is_zero_param(param) or self.residency is None:
            return False
        return not self.residency.stays(param)

    def reduces(self, number: int) -> bool:
        """Whether graphs hand a parameter's gradient over. Callers' own hooks on a parameter need autograd to do it."""
        param = self._by_number[number]
        trained = self._reducer is not None and hasattr(param, "_index_in_param_group")
        own_hooks = len(getattr(param, "_backward_hooks", None) or ()) > 1
        own_hooks |= len(getattr(param, "_post_accumulate_grad_hooks", None) or ()) > 1
        return trained and param.requires_grad and not own_hooks

    def set_persistent(self, number: int) -> None:
        """Have a parameter stay whole between passes; graphs compiled from now on do not gather it."""
        assert self.residency is not None
        self.residency.keep_whole([self._by_number[number]])

    # - shells

    def put(self) -> None:
        """Give sharded parameters the look of whole ones, for a pass; see [Note: Shells]."""
        if self._shells is None:
            self._shells = [(p, _shell(p)) for p in self._by_number.values() if is_zero_param(p)]
        for param, shell in self._shells:
            if getattr(param, "ds_shell", None) is None:
                param.ds_shell = shell
                if param.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                    param.data = shell

    def take(self) -> None:
        """The end of `put`."""
        for param, _ in self._shells or ():
            if param.__dict__.pop("ds_shell", None) is not None:
                sharded_param.empty_unless_whole(param)

    # - what operators do

    def start_gather(self, number: int) -> None:
        """Begin to gather a parameter, unless it is whole."""
        self._settle(self._config.sync_before_allgather)
        sharded_param.start_gather([self._by_number[number]], narrow=True)

    def finish_gather(self, number: int) -> torch.Tensor:
        """The whole values, in memory that is the caller's."""
        param = self._by_number[number]
        if param.ds_status is ZeroParamStatus.AVAILABLE:
            return param.detach().clone()  # somebody else reads it, too
        sharded_param.start_gather([param], narrow=True)
        sharded_param.finish_gather([param])
        self._settle(self._config.sync_after_allgather)
        whole = param.detach()
        sharded_param.release([param])
        shared = whole.untyped_storage().data_ptr() == param.ds_tensor.untyped_storage().data_ptr()
        return whole.clone() if shared else whole

    def take_grad(self, number: int, grad: torch.Tensor) -> None:
        """A backward graph has computed a parameter's gradient."""
        self._settle(self._config.sync_before_reduce)
        self.taken += 1
        share = self._share(grad)
        grad = (grad if share is None else share).contiguous()
        self._reducer.take_from_graph(self._by_number[number], grad)

    def end_backward(self) -> None:
        """A backward graph is over."""
        self._settle(self._config.sync_after_reduce)

    @staticmethod
    def _settle(asked: bool) -> None:
        if asked:
            get_accelerator().synchronize()


def _shell(param: Any) -> torch.Tensor:
    shell = torch.empty(param.ds_shape, dtype=param.dtype, device=param.ds_device)
    shell.untyped_storage().resize_(0)
    return shell
