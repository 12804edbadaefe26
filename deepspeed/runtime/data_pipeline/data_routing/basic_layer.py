# SPDX-License-Identifier: Apache-2.0
"""A layer that some tokens skip: it sees a random part of them, in order, and the others pass it unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from deepspeed.ops.random_ltd import GatherTokens, ScatterTokens, gpt_sample_tokens
from deepspeed.ops.random_ltd.dropping_utils import bert_sample_tokens, take_tokens
from deepspeed.utils.errors import explain

from ...config_errors import ConfigKeyError, ConfigValueError

_SAMPLERS = {"decoder": gpt_sample_tokens, "encoder": bert_sample_tokens}
_ORDERS = {"batch_seq_dim": True, "seq_batch_dim": False}
# arguments of transformers' layers that have an entry for each token
_PER_TOKEN = ("position_ids", "position_embeddings", "cache_position")


class RandomLayerTokenDrop(nn.Module):
    """A layer and the dropping of tokens in training; in evaluation, and before `init_config`, it is the layer alone.

    Each forward pass draws the kept tokens anew from torch's generator, so running a block again for its gradients keeps
    the same ones.

    Args:
        layer: its first argument and (first) result are hidden states of one shape.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.random_ltd_layer = layer
        self.reserved_length = -1
        self.random_ltd_scheduler: Any = None
        self.max_length: int | None = None
        self.curr_seq = -1
        self.batch_first = False
        self.mask_name: str | None = None

    def init_config(
        self, config: Mapping[str, Any], scheduler: Any, random_ltd_layer_id: int
    ) -> None:
        """Start dropping tokens.

        Args:
            config: the section ``random_ltd``.
            scheduler: says how many are kept.
            random_ltd_layer_id: which layer of the model this is.

        Raises:
            KeyError: (as ``ConfigKeyError``) a key is missing.
            ValueError: (as ``ConfigValueError``) an unknown type of model or order of dimensions.
        """
        for key in ("model_mask_name", "model_type", "hidden_state_order"):
            if key not in config:
                raise ConfigKeyError(explain(f"random_ltd needs {key!r}"))
        for key, known in (("model_type", _SAMPLERS), ("hidden_state_order", _ORDERS)):
            if config[key] not in known:
                raise ConfigValueError(
                    explain(f"unknown random_ltd.{key}", got=config[key], expected=", ".join(known))
                )
        self.random_ltd_scheduler = scheduler
        self.random_ltd_layer_id = random_ltd_layer_id
        self.max_length = scheduler.state["max_value"]
        self.mask_name = config["model_mask_name"]
        self.model_type = config["model_type"]
        self.batch_first = _ORDERS[config["hidden_state_order"]]
        self.index_generator = _SAMPLERS[self.model_type]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer on the kept tokens; the result has all of them."""
        layer = self.random_ltd_layer
        if not self.training or self.random_ltd_scheduler is None:
            return layer(hidden_states, *args, **kwargs)
        batch, seq = hidden_states.shape[:2] if self.batch_first else hidden_states.shape[1::-1]
        self.curr_seq = seq
        self.reserved_length = keep = min(self.random_ltd_scheduler.get_current_seq(), seq)
        if keep == seq:
            return layer(hidden_states, *args, **kwargs)
        if args:
            kwargs = {**_named(layer, args), **kwargs}
        mask = kwargs.get(self.mask_name) if self.mask_name is not None else None
        index, masks = self.index_generator(
            keep, seq, batch, device=hidden_states.device, attn_mask=mask
        )
        if masks is not None and self.mask_name is not None:
            kwargs[self.mask_name] = masks[0] if self.model_type == "encoder" else masks
        for name in _PER_TOKEN:
            if kwargs.get(name) is not None:
                kwargs[name] = take_tokens(kwargs[name], index[0], seq)
        hidden_states, kept = GatherTokens.apply(hidden_states, index[0], self.batch_first)
        output = layer(kept, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        whole = ScatterTokens.apply(hidden_states, first, index[0], self.batch_first)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _named(layer: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments behind the hidden states, by their names.

    Raises:
        TypeError: the layer does not name them.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    params = inspect.signature(layer.forward).parameters.values()
    names = [param.name for param in params if param.kind in kinds][1:]
    if len(names) < len(args):
        raise TypeError(
            explain(
                f"random-LTD cannot tell the arguments of {type(layer).__name__} apart",
                got=f"{len(args)} positional ones behind the hidden states",
                fix="pass them by name",
            )
        )
    return dict(zip(names, args, strict=False))
