# SPDX-License-Identifier: Apache-2.0
"""AutoTP in graphs: the collectives of divided layers become nodes."""

from __future__ import annotations

import torch

from deepspeed.module_inject.layers import (
    LinearAllreduce,
    LinearLayer,
    LmHeadLinearAllreduce,
    TensorParallelLayer,
)
from deepspeed.utils.errors import explain

from ..custom_ops import tp_collectives

NAME = "autotp"


def defer_collectives_to_compiler(model: torch.nn.Module) -> int:
    """Have the divided layers of a model call operators; returns how many there are.

    Raises:
        NotImplementedError: for a layer that cannot; then none is changed.
    """
    layers = [each for each in model.modules() if isinstance(each, TensorParallelLayer)]
    divided = [each for each in layers if each.mp_group is not None]
    for layer in divided:
        if not _can(layer):
            raise NotImplementedError(
                explain(
                    "the compile pass autotp cannot rewrite a layer",
                    got=type(layer).__name__,
                    expected="LinearLayer, LinearAllreduce, or one of their kinds for joined weights",
                    fix="remove 'autotp' from compile.passes, or the layer from the partition configuration",
                )
            )
    tp_collectives.define_ops()
    for layer in divided:
        layer.defer_collectives_to_compiler = True
    return len(divided)


def _can(layer: TensorParallelLayer) -> bool:
    if isinstance(layer, LmHeadLinearAllreduce) or layer.unsupported_reason is not None:
        return False
    if isinstance(layer, LinearLayer):
        several = layer.__dict__.get("_subparam_shard_widths") is not None
        return not (layer.__dict__.get("gather_output") and several)
    return isinstance(layer, LinearAllreduce)
