# SPDX-License-Identifier: Apache-2.0
"""Sparse attention in BERT and RoBERTa models of transformers: longer positions, other layers, padded batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import explain

from .bert_sparse_self_attention import BertSparseSelfAttention
from .sparsity_config import SparsityConfig

# models by the attribute that holds their encoder -> rows of position embeddings that stand for no position
_RESERVED = {"bert": 0, "roberta": 2}


class SparseAttentionUtils:
    """Steps on the way from a model with dense attention to one with sparse attention."""

    @staticmethod
    def extend_position_embedding(model: nn.Module, max_position: int) -> nn.Module:
        """Give a model position embeddings for longer sequences, by repeating those that it has.

        Args:
            model: BERT or RoBERTa of transformers; changed in place.
            max_position: positions from now on.

        Raises:
            ValueError: another model, or fewer positions than there are.
        """
        kind, base = _encoder_of(model)
        reserved = _RESERVED[kind]
        embeddings = base.embeddings
        old = embeddings.position_embeddings.weight.data
        known = len(old) - reserved
        if max_position < known:
            raise ValueError(
                explain(
                    "position embeddings can only become more",
                    got=max_position,
                    expected=f"at least {known}",
                )
            )
        repeated = old[reserved:].repeat(-(-max_position // known), 1)[:max_position]
        weight = torch.cat((old[:reserved], repeated))
        table = embeddings.position_embeddings
        table.weight.data, table.num_embeddings = weight, len(weight)
        places = torch.arange(len(weight), device=old.device)[None]
        for name, values in (
            ("position_ids", places),
            ("token_type_ids", torch.zeros_like(places)),
        ):
            if getattr(embeddings, name, None) is not None:
                embeddings._buffers[name] = values
        model.config.max_position_embeddings = len(weight)
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """Have a tokenizer cut texts at `max_position` tokens."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def replace_model_self_attention_with_sparse_self_attention(
        model: nn.Module, max_position: int, sparsity_config: SparsityConfig | None = None
    ) -> nn.Module:
        """Give a model's layers sparse attention with the weights that they have.

        Args:
            model: BERT or RoBERTa of transformers; changed in place.
            max_position: the longest sequence.
            sparsity_config: the pattern.

        Raises:
            ValueError: another model, or one that is a decoder.
        """
        kind, base = _encoder_of(model)
        if getattr(model.config, "is_decoder", False):
            raise ValueError(
                explain(
                    "layers that see no later tokens cannot be replaced: padding is the only mask they would keep",
                    got="is_decoder",
                    fix="Use SparseSelfAttention with a causal attn_mask in layers of your own.",
                )
            )
        model.config.max_position_embeddings = max_position + _RESERVED[kind]
        SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
            model.config, base.encoder.layer, sparsity_config
        )
        return model

    @staticmethod
    def replace_self_attention_layer_with_sparse_self_attention_layer(
        config: Any, layers: nn.ModuleList, sparsity_config: SparsityConfig | None = None
    ) -> nn.ModuleList:
        """Replace `attention.self` of each layer; its projections stay."""
        for layer in layers:
            dense = layer.attention.self
            sparse = _InLayer(config, sparsity_config)
            sparse.query, sparse.key, sparse.value = dense.query, dense.key, dense.value
            sparse.sparse_self_attention.to(dense.query.weight.device)
            layer.attention.self = sparse.train(dense.training)
        return layers

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
        model_embeddings: Any,
    ) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Lengthen a batch to whole blocks.

        Args:
            block_size: positions of a block.
            input_ids, attention_mask, token_type_ids, position_ids: `[batch, L]` or None.
            inputs_embeds: `[batch, L, hidden]`, in place of `input_ids`.
            pad_token_id: of the tokens that are added, which are masked out.
            model_embeddings: gives embeddings of token ids, for `inputs_embeds`.

        Returns:
            How many positions came, and the five.

        Raises:
            ValueError: neither tokens nor embeddings.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError(
                explain("there is nothing to pad", expected="input_ids or inputs_embeds")
            )
        batch, length = given.shape[:2]
        pad = -length % block_size

        def padded(values: Tensor | None, fill: int) -> Tensor | None:
            return None if values is None else nn.functional.pad(values, (0, pad), value=fill)

        if pad:
            if attention_mask is None:
                attention_mask = torch.ones(batch, length, dtype=torch.long, device=given.device)
            if inputs_embeds is not None:
                ids = torch.full((batch, pad), pad_token_id, device=given.device)
                inputs_embeds = torch.cat((inputs_embeds, model_embeddings(ids)), dim=1)
            input_ids, position_ids = (
                padded(input_ids, pad_token_id),
                padded(position_ids, pad_token_id),
            )
            attention_mask, token_type_ids = padded(attention_mask, 0), padded(token_type_ids, 0)
        return pad, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
        """Take away the positions that `pad_to_block_size` added."""
        return sequence_output[:, :-pad_len] if pad_len > 0 else sequence_output


class _InLayer(BertSparseSelfAttention):
    """What a layer of transformers calls: more arguments, a pair of results."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = attention_mask[:, 0, -1]  # padding is the same for all queries
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            kept = torch.zeros(attention_mask.shape, device=attention_mask.device)
            attention_mask = kept.masked_fill_(~attention_mask, float("-inf"))
        return super().forward(hidden_states, attention_mask), None


def _encoder_of(model: nn.Module) -> tuple[str, Any]:
    for kind in _RESERVED:
        if hasattr(model, kind):
            return kind, getattr(model, kind)
    told = getattr(getattr(model, "config", None), "model_type", "")
    if told in _RESERVED:
        return told, model
    raise ValueError(
        explain(
            "sparse attention can be put into BERT and RoBERTa models only",
            got=type(model).__name__,
            fix="Use SparseSelfAttention in the layers of other models.",
        )
    )
