# SPDX-License-Identifier: Apache-2.0
"""Tensors between neighbouring stages.

The first message of a kind in a batch is preceded by a header, which names dtypes and shapes; the ones after it have
the same, unless the pipeline says that shapes vary, when each has its header.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist
from deepspeed.utils.errors import explain

Header = list[tuple[str, list[int], bool]]


class Channel:
    """Messages of one kind between this rank and another.

    Args:
        peer: the other rank.
        device: where tensors are received.
        varying: whether each message has its header.
    """

    def __init__(self, peer: int, device: torch.device, varying: bool) -> None:
        self.peer, self.device, self.varying = peer, device, varying
        self.header: Header | None = None
        self.is_tuple = False

    def reset(self) -> None:
        """The next message has a header."""
        self.header = None

    def send(self, tensors: Sequence[Tensor], is_tuple: bool = True) -> None:
        """Send tensors; the other rank must receive. `is_tuple` travels with the header.

        Raises:
            ValueError: their shapes differ from the message before and were not announced as varying.
        """
        header: Header = [(str(t.dtype), list(t.shape), t.requires_grad) for t in tensors]
        if self.header is None or self.varying:
            self.is_tuple = is_tuple
            self._send_header(header)
        elif [row[:2] for row in header] != [row[:2] for row in self.header]:
            raise ValueError(
                explain(
                    "activations changed their shape within a batch",
                    got=str(header),
                    expected=str(self.header),
                    fix="make the PipelineModule with dynamic_shape=True",
                )
            )
        for tensor in tensors:
            dist.send(tensor.detach().contiguous(), self.peer)

    def receive(self) -> list[Tensor]:
        """The tensors that the other rank sends; those that had a graph there are leaves that want gradients."""
        if self.header is None or self.varying:
            self.header = self._receive_header()
        received = []
        for dtype, shape, wants_grad in self.header:
            tensor = torch.empty(
                shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=self.device
            )
            dist.recv(tensor, self.peer)
            received.append(tensor.requires_grad_(wants_grad))
        return received

    def _send_header(self, header: Header) -> None:
        text = json.dumps([self.is_tuple, header]).encode("utf-8")
        body = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
        dist.send(torch.tensor([len(text)], dtype=torch.int64, device=self.device), self.peer)
        dist.send(body, self.peer)
        self.header = header

    def _receive_header(self) -> Header:
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(length, self.peer)
        body = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        dist.recv(body, self.peer)
        self.is_tuple, rows = json.loads(bytes(body.tolist()).decode("utf-8"))
        return [tuple(row) for row in rows]


def pack(value: Any) -> list[Tensor]:
    """The tensors of what a stage returns or takes.

    Raises:
        TypeError: it is neither a tensor nor a tuple of tensors.
    """
    tensors = list(value) if isinstance(value, (tuple, list)) else [value]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(
            explain(
                "what goes from stage to stage must be tensors",
                got=", ".join(type(tensor).__name__ for tensor in tensors),
                expected="a tensor, or a tuple of tensors",
                fix="let the last layer of each stage return tensors",
            )
        )
    return tensors


def unpack(tensors: Sequence[Tensor], is_tuple: bool) -> Any:
    """A tuple, or the one tensor by itself."""
    return tuple(tensors) if is_tuple else tensors[0]
