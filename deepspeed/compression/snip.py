# SPDX-License-Identifier: Apache-2.0
"""`snip_momentum`: blocks of weights go little by little, those first whose loss would change least without them.

A weight's score is a running mean of |weight x gradient| over the backward passes. At each update, the blocks with the
smallest mean scores of all layers are masked, so that the share of masked weights is
``(1 - dense_ratio) * (1 - (1 - progress)^3)``, `progress` going from 0 at `schedule_offset` to 1 at
`schedule_offset_end`. What is masked stays so: it gets no gradient, and so no score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.zero.own_slice import is_zero_param
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .helper import module_replacement
from .techniques import SNIP, matching

_MOMENTUM = 0.9


def block_of(pattern: str) -> tuple[int, int]:
    """Rows and columns of a block, of a pattern like ``4x1``.

    Raises:
        ValueError: the pattern is of another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern)
    if match is None:
        raise ValueError(
            explain("unknown block_pattern", got=pattern, expected="rows x columns, such as '4x1'")
        )
    return int(match[1]), int(match[2])


def prepare_snip(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Give each linear layer and convolution of a model a mask, but those that the settings exclude.

    Raises:
        ValueError: the model's weights are sharded; no end of the schedule, or one before its beginning.
    """
    end = settings["schedule_offset_end"]
    if end is None or end < settings["schedule_offset"]:
        raise ValueError(
            explain(
                "sparse_pruning by snip_momentum needs schedule_offset_end",
                got=end,
                expected=f"a step from schedule_offset, {settings['schedule_offset']}, on",
            )
        )
    rows, columns = block_of(settings["block_pattern"])
    excluded = [re.compile(pattern).search for pattern in settings["excluded_modules"]]
    for name in matching(model, "*", "enable_sparse_pruning"):
        if any(search(name) for search in excluded):
            continue
        weight: Any = model.get_submodule(name).weight
        if is_zero_param(weight):
            _refuse_sharded()
        height, width = weight.shape[0], weight[0].numel()
        if height % rows or width % columns:
            logger.warning(
                f"{name} is not pruned: blocks of {rows}x{columns} do not fill a weight of {height}x{width}"
            )
            continue
        layer: Any = module_replacement(model, name)
        layer.sparse_pruning_method = SNIP
        layer.register_buffer("sparse_pruning_mask", torch.ones_like(layer.weight.data))


def _refuse_sharded() -> None:
    raise ValueError(
        "sparse_pruning by snip_momentum needs whole weights: use ZeRO stage 0, 1 or 2, or the method l1 or topk"
    )


class SnipPruner:
    """Keeps the scores of a model's prepared layers and updates their masks.

    Args:
        layers: by name; those that `prepare_snip` has not prepared are left alone.
        settings: the shared ones of ``sparse_pruning``.
    """

    def __init__(self, layers: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.layers = [
            layer
            for layer in layers.values()
            if getattr(layer, "sparse_pruning_method", None) == SNIP
        ]
        self.settings, self.block = settings, block_of(settings["block_pattern"])
        self.axis: Axis | None = None
        self.scores: dict[int, Tensor] = {}
        for layer in self.layers:
            layer.weight.register_hook(lambda grad, layer=layer: self._see(layer, grad))

    def _see(self, layer: Any, grad: Tensor) -> None:
        weight = layer.weight
        if is_zero_param(weight):
            _refuse_sharded()
        effect = (weight.detach() * grad).abs().float().nan_to_num(0.0, 0.0, 0.0)
        former = self.scores.get(id(layer))
        self.scores[id(layer)] = effect if former is None else former.mul_(_MOMENTUM).add_(effect)

    def sparsity(self, step: int) -> float:
        """The share of weights that is to be masked after that many steps."""
        first, last = self.settings["schedule_offset"], self.settings["schedule_offset_end"]
        progress = min((step - first) / max(last - first, 1), 1.0) if step < last else 1.0
        return (1 - self.settings["dense_ratio"]) * (1 - (1 - progress) ** 3)

    def step(self, step: int) -> None:
        """Update the masks where the schedule says so; all ranks that share the weights call it."""
        first, last = self.settings["schedule_offset"], self.settings["schedule_offset_end"]
        due = (step - first) % self.settings["schedule_offset_stride"] == 0 or step == last
        if first <= step <= last and due and self.layers and len(self.scores) == len(self.layers):
            self._update(self.sparsity(step))

    def _update(self, sparsity: float) -> None:
        of_blocks = []
        for layer in self.layers:
            score = self.scores[id(layer)]
            if self.axis is not None:
                score = score.clone()
                flat.all_reduce_(score, self.axis)
            # what is masked goes first
            of_blocks.append(
                self._blocks(score) - (self._blocks(layer.sparse_pruning_mask) == 0).float()
            )
        every = torch.cat([scores.flatten() for scores in of_blocks])
        gone = round(sparsity * every.numel())
        if not gone:
            return
        mask = torch.ones_like(every)
        mask[every.argsort(stable=True)[:gone]] = 0
        parts = mask.split([scores.numel() for scores in of_blocks])
        rows, columns = self.block
        for layer, scores, part in zip(self.layers, of_blocks, parts, strict=True):
            spread = part.view_as(scores).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            buffer = layer.sparse_pruning_mask
            buffer.copy_(spread.view_as(buffer))

    def _blocks(self, values: Tensor) -> Tensor:
        rows, columns = self.block
        flat_values = values.float().reshape(values.shape[0], -1)
        height, width = flat_values.shape
        return flat_values.view(height // rows, rows, width // columns, columns).mean((1, 3))
