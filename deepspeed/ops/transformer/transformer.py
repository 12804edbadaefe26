# SPDX-License-Identifier: Apache-2.0
"""`DeepSpeedTransformerLayer`: a layer of BERT's encoder, made of torch's fused operations."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass
class DeepSpeedTransformerConfig:
    """What a layer looks like.

    Attributes:
        batch_size: not needed: any batch is taken.
        hidden_size: features of a token.
        intermediate_size: features between the two products of the second half; -1 is four times `hidden_size`.
        heads: attention heads.
        attn_dropout_ratio, hidden_dropout_ratio: of attention weights; of what each half adds to its input.
        num_hidden_layers: layers of the model, by which `adjust_init_range` scales.
        initializer_range: standard deviation of fresh weights.
        layer_norm_eps: added to the variance.
        local_rank, seed: not needed: dropout draws from torch's generator of the device.
        fp16: weights are made in half precision.
        pre_layer_norm: normalise the input of each half; else its sum.
        normalize_invertible: not needed: torch's normalisation keeps its input, and what lies behind is not kept twice.
        gelu_checkpoint: compute the activation again in the backward pass instead of keeping it.
        adjust_init_range: draw weights that lead back into the sum with a deviation smaller by `sqrt(2 num_hidden_layers)`.
        attn_dropout_checkpoint: compute attention again in the backward pass instead of keeping its weights.
        stochastic_mode: not needed: nothing is faster for being inexact.
        return_tuple: return the output in a tuple.
        training: False leaves dropout out.
    """

    batch_size: int = -1
    hidden_size: int = -1
    intermediate_size: int = -1
    heads: int = -1
    attn_dropout_ratio: float = -1
    hidden_dropout_ratio: float = -1
    num_hidden_layers: int = -1
    initializer_range: float = -1
    layer_norm_eps: float = 1e-12
    local_rank: int = -1
    seed: int = -1
    fp16: bool = False
    pre_layer_norm: bool = True
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    adjust_init_range: bool = True
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False
    return_tuple: bool = False
    training: bool = True

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> DeepSpeedTransformerConfig:
        """From a mapping with the attributes' names; others are kept as attributes too."""
        made = cls()
        for key, value in json_object.items():
            setattr(made, key, value)
        return made

    @classmethod
    def from_json_file(cls, json_file: str) -> DeepSpeedTransformerConfig:
        """From a file of JSON; see `from_dict`."""
        with open(json_file, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))


class DeepSpeedTransformerLayer(nn.Module):
    """A layer of BERT's encoder (Devlin et al., 2018), normalised before or after each half.

    Args:
        config: what it looks like; it is copied.
        initial_weights: eight tensors: of query, key, value and attention output `[hidden, hidden]`, of the attention's
            normalisation `[hidden]`, `[intermediate, hidden]`, `[hidden, intermediate]`, of the last normalisation; they
            are copied. None draws fresh ones.
        initial_biases: the eight that go with them.

    Raises:
        ValueError: a size is missing, or `heads` does not divide `hidden_size`.
    """

    def __init__(
        self,
        config: DeepSpeedTransformerConfig,
        initial_weights: Sequence[Tensor] | None = None,
        initial_biases: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config = copy.copy(config)
        _check(config)
        width = config.hidden_size
        inner = config.intermediate_size if config.intermediate_size > 0 else 4 * width
        dtype = torch.half if config.fp16 else torch.get_default_dtype()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype))

        self.attn_qkvw, self.attn_qkvb = weight(3 * width, width), weight(3 * width)
        self.attn_ow, self.attn_ob = weight(width, width), weight(width)
        self.attn_nw, self.attn_nb = weight(width), weight(width)
        self.inter_w, self.inter_b = weight(inner, width), weight(inner)
        self.output_w, self.output_b = weight(width, inner), weight(width)
        self.norm_w, self.norm_b = weight(width), weight(width)
        self.reset_parameters()
        for given, kind in ((initial_weights, "w"), (initial_biases, "b")):
            if given is not None:
                self._take(given, kind)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights anew; biases are zero, normalisations do nothing."""
        config = self.config
        spread = config.initializer_range if config.initializer_range > 0 else 0.02
        back = spread
        if config.adjust_init_range and config.num_hidden_layers > 0:
            back /= math.sqrt(2.0 * config.num_hidden_layers)
        for weight, deviation in (
            (self.attn_qkvw, spread),
            (self.attn_ow, back),
            (self.inter_w, spread),
            (self.output_w, back),
        ):
            weight.normal_(0.0, deviation)
        for scale in (self.attn_nw, self.norm_w):
            scale.fill_(1.0)
        for name, param in self.named_parameters():
            if name.endswith("b"):
                param.zero_()

    @torch.no_grad()
    def _take(self, given: Sequence[Tensor], kind: str) -> None:
        names = ("attn_o", "attn_n", "inter_", "output_", "norm_")
        if len(given) != 3 + len(names):
            raise ValueError(f"initial weights and biases are 8 tensors each, got {len(given)}")
        getattr(self, f"attn_qkv{kind}").copy_(torch.cat([tensor.detach() for tensor in given[:3]]))
        for name, tensor in zip(names, given[3:], strict=True):
            getattr(self, name + kind).copy_(tensor)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *others: Any,
        grads: Any = None,
        **named: Any,
    ) -> Tensor | tuple[Tensor]:
        """Compute the layer.

        Args:
            hidden_states: `[batch, tokens, hidden]`; cast to the weights' dtype.
            attention_mask: added to the attention's scores, `[batch, 1, 1 or tokens, tokens]`.
            others, named: what layers of other kinds take (`head_mask`, `past_key_value`, ...): None or False here.
            grads: not used.

        Raises:
            ValueError: something is asked for that an encoder's layer does not do.
        """
        if any(value is not None and value is not False for value in (*others, *named.values())):
            raise ValueError(
                "a DeepSpeedTransformerLayer is an encoder's: it takes hidden_states and attention_mask, "
                f"and gives no attention weights; it got {len(others)} others and {sorted(named)}"
            )
        x = hidden_states.to(self.attn_qkvw.dtype)
        if self.config.pre_layer_norm:
            x = x + self._attention(self._first_norm(x), attention_mask)
            out = x + self._feed_forward(self._second_norm(x))
        else:
            x = self._second_norm(x + self._attention(x, attention_mask))
            out = self._first_norm(x + self._feed_forward(x))
        return (out,) if self.config.return_tuple else out

    def _first_norm(self, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.norm_w, self.norm_b, self.config.layer_norm_eps
        )

    def _second_norm(self, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.attn_nw, self.attn_nb, self.config.layer_norm_eps
        )

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.config.heads
        mixed = functional.linear(x, self.attn_qkvw, self.attn_qkvb)
        query, key, value = mixed.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask.to(x.dtype)
        dropped = self._ratio(self.config.attn_dropout_ratio)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(query, key, value, mask, dropped)

        if self.config.attn_dropout_checkpoint and torch.is_grad_enabled():
            seen = checkpoint(attend, query, key, value, use_reentrant=False)
        else:
            seen = attend(query, key, value)
        seen = seen.transpose(1, 2).reshape(batch, tokens, width)
        return self._drop(functional.linear(seen, self.attn_ow, self.attn_ob))

    def _feed_forward(self, x: Tensor) -> Tensor:
        between = functional.linear(x, self.inter_w, self.inter_b)

        def back(between: Tensor) -> Tensor:
            active = functional.gelu(between, approximate="tanh")
            return functional.linear(active, self.output_w, self.output_b)

        if self.config.gelu_checkpoint and torch.is_grad_enabled():
            return self._drop(checkpoint(back, between, use_reentrant=False))
        return self._drop(back(between))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self._ratio(self.config.hidden_dropout_ratio))

    def _ratio(self, ratio: float) -> float:
        return max(0.0, ratio) if self.training and self.config.training else 0.0


def _check(config: DeepSpeedTransformerConfig) -> None:
    missing = [name for name in ("hidden_size", "heads") if getattr(config, name) <= 0]
    if missing:
        raise ValueError(f"a transformer layer needs {' and '.join(missing)}: set them above 0")
    if config.hidden_size % config.heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} cannot be divided among {config.heads} heads"
        )
