# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal model as a function of new tokens and the keys and values of those before them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deepspeed.utils.errors import explain

from .ragged.kv_cache import LayerShape

KeysValues = Sequence[tuple[torch.Tensor, torch.Tensor]]


class HFModel:
    """Calls a model whose layers all keep keys and values, in whatever form its release of transformers hands them over.

    Args:
        model: with a language modelling head, on its device, in evaluation mode.
        device: where its inputs go.

    Raises:
        ValueError: the model keeps something else.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        # transformers 5.24 renamed what was before, of inputs and outputs alike
        renamed = "cache" in takes and "past_key_values" not in takes
        self._past_name = "cache" if renamed else "past_key_values"
        last_only = [n for n in ("logits_to_keep", "num_logits_to_keep") if n in takes]
        self._last_only: dict[str, Any] = dict.fromkeys(last_only[:1], 1)
        self._near = _near_positions(getattr(model, "config", None))
        self.shapes, self.dtype = self._probe()

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model was made for, if it says so."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    def is_far(self, length: int) -> bool:
        """Whether a sequence of that length needs the second of a model's two sets of rotary angles."""
        return self._near is not None and length > self._near

    @torch.no_grad()
    def __call__(
        self, tokens: torch.Tensor, lengths: torch.Tensor, past: KeysValues
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run as many new tokens of some sequences.

        Args:
            tokens: [sequences, new], int64.
            lengths: [sequences], tokens that each has already.
            past: of each layer, keys and values [sequences, heads, before, head size], each sequence's own at the end.

        Returns:
            Logits after the last token, [sequences, vocabulary]; keys and values of the new tokens.
        """
        count, new = tokens.shape
        before = past[0][0].shape[2] if past else 0
        lengths = lengths.to(self.device)
        there = torch.arange(before, device=self.device) >= before - lengths[:, None]
        mask = torch.cat([there, there.new_ones(count, new)], dim=1).long()
        more = {**self._last_only, self._past_name: self._to_past(past)}
        if self._takes_positions:
            more["position_ids"] = lengths[:, None] + torch.arange(new, device=self.device)
        out = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **more,
        )
        kept = self._of_past(getattr(out, self._past_name))
        made = [(keys[:, :, -new:], values[:, :, -new:]) for keys, values in kept]
        return out.logits[:, -1], made

    def _to_past(self, layers: KeysValues) -> Any:
        """The form in which the model takes what was before."""
        if not getattr(self.model, "_supports_cache_class", True):
            return tuple(layers) or None
        from transformers import DynamicCache  # not needed by anything else of ours

        past = DynamicCache()
        for number, (keys, values) in enumerate(layers):
            past.update(keys, values, number)
        return past

    @staticmethod
    def _of_past(past: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, in whatever form they come."""
        if isinstance(past, (tuple, list)):
            return [(layer[0], layer[1]) for layer in past]
        if hasattr(past, "layers"):
            return [(layer.keys, layer.values) for layer in past.layers]
        if hasattr(past, "key_cache"):
            return list(zip(past.key_cache, past.value_cache, strict=True))
        return []

    def _probe(self) -> tuple[list[tuple[LayerShape, LayerShape]], torch.dtype]:
        """Find what each layer keeps, by two sequences of three tokens."""
        tokens = torch.zeros(2, 3, dtype=torch.int64, device="cpu")
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        cause = None
        try:
            _, made = self(tokens, torch.zeros(2, dtype=torch.int64, device="cpu"), [])
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # another interface
            cause = error
        flat = [kind for layer in made for kind in layer]
        if not flat or any(
            not isinstance(kind, torch.Tensor)
            or kind.dim() != 4
            or len(kind) != 2
            or kind.shape[2] != 3
            for kind in flat
        ):
            raise ValueError(
                explain(
                    "ragged batching needs a model that keeps keys and values of each token",
                    got=type(self.model).__name__,
                    expected="each layer's as [sequences, heads, tokens, head size]",
                    fix="Use deepspeed.init_inference and generate().",
                )
            ) from cause
        shapes = [(_shape(keys), _shape(values)) for keys, values in made]
        return shapes, flat[0].dtype


def _near_positions(config: Any) -> int | None:
    """Up to which length LongRoPE has its first set of angles; None for other rotary embeddings."""
    kinds = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(kinds, dict):
        return None
    if "longrope" not in (kinds.get("rope_type"), kinds.get("type")):
        return None
    name = "original_max_position_embeddings"
    return kinds.get(name) or getattr(config, name, None)


def _shape(kept: torch.Tensor) -> LayerShape:
    return LayerShape(kept.shape[1], kept.shape[3])
