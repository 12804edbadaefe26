# SPDX-License-Identifier: Apache-2.0
"""A module's forward pass captured on the accelerator once for each form of its inputs, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepspeed.accelerator import get_accelerator

_WARM_UP = 3


class ForwardGraphs:
    """Replays a function on static inputs.

    Results are overwritten by the next call with inputs of the same form.

    Args:
        function: what is captured; it may only use the accelerator, and decide nothing by values.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._captured: dict[Any, tuple[Any, list[torch.Tensor], Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names, values = list(kwargs), [*args, *kwargs.values()]
        form = (len(args), *names, *(_form(value) for value in values))
        if form not in self._captured:
            self._captured[form] = self._capture(len(args), names, values)
        graph, inputs, output = self._captured[form]
        given = [value for value in values if torch.is_tensor(value)]
        for static, value in zip(inputs, given, strict=True):
            static.copy_(value)
        get_accelerator().replay_graph(graph)
        return output

    @torch.no_grad()
    def _capture(
        self, count: int, names: list[str], values: list[Any]
    ) -> tuple[Any, list[torch.Tensor], Any]:
        accelerator = get_accelerator()
        static = [value.clone() if torch.is_tensor(value) else value for value in values]
        args, kwargs = static[:count], dict(zip(names, static[count:], strict=True))
        accelerator.synchronize()  # the inputs are there
        with accelerator.stream(accelerator.Stream()):
            for _ in range(_WARM_UP):
                self.function(*args, **kwargs)
        accelerator.synchronize()
        graph = accelerator.create_graph()
        with accelerator.capture_to_graph(graph):
            output = self.function(*args, **kwargs)
        return graph, [value for value in static if torch.is_tensor(value)], output


def _form(value: Any) -> Any:
    if torch.is_tensor(value):
        return (tuple(value.shape), value.dtype, value.device)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
