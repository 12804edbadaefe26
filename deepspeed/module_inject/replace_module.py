# SPDX-License-Identifier: Apache-2.0
"""Kernel injection by its public names: put a decoder program beside a model, and take it away."""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .decoder import Decoder
from .families import FAMILIES, NotFused, read_weights

_PLACE = "_ds_decoder"  # a plain attribute of the model, not one of its submodules


def inject(model: nn.Module, graphs: bool = False) -> Decoder | None:
    """Make a model's decoder program; None, with a warning that says why, where it has none.

    The model itself gets no reference to it, so that it can be saved and copied as before.

    Args:
        model: a model of transformers in its final dtype and place.
        graphs: capture the step on the accelerator.
    """
    try:
        return Decoder(read_weights(model), graphs)
    except NotFused as why:
        logger.warning(f"no fused decoder for this model, it runs as it is: {why}")
        return None


def decoder_of(model: nn.Module) -> Decoder | None:
    """The decoder program that `replace_transformer_layer` gave to a model."""
    return model.__dict__.get(_PLACE)


def replace_transformer_layer(
    orig_layer_impl: Any,
    model: nn.Module,
    checkpoint_dict: Any = None,
    config: Any = None,
    model_config: Any = None,
) -> nn.Module:
    """Give a model the fused program of its family.

    Args:
        orig_layer_impl: class of its blocks; None finds it. Kept for callers: the model's class decides.
        model: a causal language model of transformers in its final dtype and place.
        checkpoint_dict: must be None; `init_inference` loads checkpoints.
        config: the inference configuration; `enable_cuda_graph` is read from it.
        model_config: unused.

    Returns:
        `model`, whose params are now views of packed weights.

    Raises:
        NotImplementedError: a checkpoint, or a class without a fused program.
    """
    if checkpoint_dict is not None:
        raise NotImplementedError(
            explain(
                "replace_transformer_layer loads no checkpoint",
                fix="Use deepspeed.init_inference(model, checkpoint=...).",
            )
        )
    graphs = bool(getattr(config, "enable_cuda_graph", False))
    decoder = inject(model, graphs)
    if decoder is None:
        raise NotImplementedError(
            explain(
                "this model has no fused program",
                got=type(model).__name__,
                expected=f"one of {', '.join(FAMILIES)}, with the usual settings",
            )
        )
    model.__dict__[_PLACE] = decoder
    return model


def revert_transformer_layer(
    orig_layer_impl: Any, model: nn.Module, config: Any = None, preln: bool = False
) -> nn.Module:
    """Take the fused program away; the model's own layers go on with the same weights."""
    model.__dict__.pop(_PLACE, None)
    return model
