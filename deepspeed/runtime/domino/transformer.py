# SPDX-License-Identifier: Apache-2.0
"""Megatron's transformer over tensor-parallel ranks, in two halves of a batch; see `overlap`."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.activation_checkpointing.rng import get_cuda_rng_tracker
from deepspeed.utils.errors import explain

from .overlap import Pending, column, finish_sum, mark, start_sum

Halves = tuple[Tensor, Tensor]


class LayerType(enum.Enum):
    """Megatron's kinds of layers."""

    encoder = 1
    decoder = 2


class AttnType(enum.Enum):
    """Megatron's kinds of attention."""

    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    """Which keys a query sees: those that the mask leaves, or those up to it."""

    padding = 1
    causal = 2


class ModelType(enum.Enum):
    """Megatron's kinds of models."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2


class _Divided(nn.Module):
    """A linear layer's weight and bias, of which each rank has a part."""

    def __init__(
        self,
        config: Any,
        axis: Axis,
        inputs: int,
        outputs: int,
        by_rows: bool,
        init: Callable[..., Any],
    ) -> None:
        super().__init__()
        cut = inputs if by_rows else outputs
        if cut % axis.size:
            raise ValueError(
                explain(
                    "a layer does not divide over the tensor-parallel ranks",
                    got=f"{cut} over {axis.size} ranks",
                )
            )
        self.axis = axis
        options = {"dtype": config.params_dtype, "device": get_accelerator().current_device_name()}
        shape = (outputs, inputs // axis.size) if by_rows else (outputs // axis.size, inputs)
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = None
        if getattr(config, "add_bias_linear", True):
            self.bias = nn.Parameter(torch.zeros(shape[0], **options))
        for param, divided in ((self.weight, True), (self.bias, not by_rows)):
            if param is not None:  # as Megatron marks what differs from rank to rank
                param.tensor_model_parallel = divided
                param.partition_dim, param.partition_stride = int(by_rows), 1
        if getattr(config, "perform_initialization", True):
            with _stream_of(axis):
                init(self.weight)


class _Column(_Divided):
    """Some of the outputs."""

    def forward(self, x: Tensor, pending: Pending) -> Tensor:
        return column(x, self.weight, self.bias, self.axis, pending)


class _Row(_Divided):
    """A partial sum of the outputs, on its way to the whole; the bias is left to who gets that."""

    def forward(self, x: Tensor, pending: Pending) -> Tensor:
        return start_sum(functional.linear(x, self.weight), self.axis, pending)


class ShardedAttention(nn.Module):
    """Self-attention by a rank's heads.

    Args:
        config: Megatron's, with `hidden_size`, `kv_channels`, `num_attention_heads`, `attention_dropout`,
            `params_dtype`, `init_method` and `output_layer_init_method`.
        mpu: gives the tensor-parallel ranks.
        apply_rotary_pos_emb: turns queries and keys by what `forward` is given.
        layer_number: of this layer, from 1.
        attention_type: must be self-attention.
        attn_mask_type: which keys a query sees.
    """

    def __init__(
        self,
        config: Any,
        mpu: Any,
        apply_rotary_pos_emb: Callable[..., Tensor],
        layer_number: int,
        attention_type: AttnType = AttnType.self_attn,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
    ) -> None:
        super().__init__()
        if attention_type is not AttnType.self_attn:
            _refuse("cross-attention")
        axis = Axis.of_group(mpu.get_tensor_model_parallel_group())
        self.axis, self.layer_number = axis, max(1, layer_number)
        self.head_size, self.mask_type = config.kv_channels, attn_mask_type
        self.dropout = config.attention_dropout
        self.apply_rotary_pos_emb = apply_rotary_pos_emb
        width, hidden = config.kv_channels * config.num_attention_heads, config.hidden_size
        if config.num_attention_heads % axis.size:
            raise ValueError(
                explain(
                    "heads do not divide over the tensor-parallel ranks",
                    got=f"{config.num_attention_heads} over {axis.size}",
                )
            )
        self.query_key_value = _Column(config, axis, hidden, 3 * width, False, config.init_method)
        self.dense = _Row(config, axis, width, hidden, True, config.output_layer_init_method)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        waits: tuple[Pending, Pending],
        rotary_pos_emb: Any = None,
    ) -> Tensor:
        """`[sequence, batch, hidden]` to the same, on its way from all ranks and without the bias.

        Args:
            hidden_states: behind its `mark`.
            attention_mask: true where a key is not seen; unused where attention is causal.
            waits: for the gradient of the input, and for the output.
            rotary_pos_emb: for queries and keys, or a pair of them.
        """
        mixed = self.query_key_value(hidden_states, waits[0])
        query, key, value = mixed.unflatten(-1, (-1, 3 * self.head_size)).chunk(3, -1)
        if rotary_pos_emb is not None:
            pair = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
            query = self.apply_rotary_pos_emb(query, pair[0])
            key = self.apply_rotary_pos_emb(key, pair[1])
        causal = self.mask_type is AttnMaskType.causal
        seen = None if causal or attention_mask is None else ~attention_mask
        dropout = self.dropout if self.training else 0.0
        with _stream_of(self.axis) if dropout else contextlib.nullcontext():
            context = functional.scaled_dot_product_attention(
                *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
                attn_mask=seen,
                dropout_p=dropout,
                is_causal=causal,
            )
        return self.dense(context.permute(2, 0, 1, 3).flatten(2), waits[1])


class DominoTransformerLayer(nn.Module):
    """Attention and MLP of two halves of a batch, in turn.

    Args:
        config: see `ShardedAttention`, and `ffn_hidden_size`, `hidden_dropout`, `layernorm_epsilon`,
            `gated_linear_unit`, `apply_residual_connection_post_layernorm`.
        mpu, apply_rotary_pos_emb, layer_number: see `ShardedAttention`.
        layer_type: must be an encoder's.
        self_attn_mask_type: which keys a query sees.
        drop_path_rate: must be 0.
    """

    def __init__(
        self,
        config: Any,
        mpu: Any,
        apply_rotary_pos_emb: Callable[..., Tensor],
        layer_number: int,
        layer_type: LayerType = LayerType.encoder,
        self_attn_mask_type: AttnMaskType = AttnMaskType.causal,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if layer_type is not LayerType.encoder or drop_path_rate:
            _refuse("another layer than an encoder's, and dropped paths")
        self.layer_number = layer_number
        self.after_norm = getattr(config, "apply_residual_connection_post_layernorm", False)
        self.dropout, self.gated = (
            config.hidden_dropout,
            getattr(config, "gated_linear_unit", False),
        )
        self.input_layernorm = _norm(config)
        self.self_attention = ShardedAttention(
            config, mpu, apply_rotary_pos_emb, layer_number, attn_mask_type=self_attn_mask_type
        )
        self.post_attention_layernorm = _norm(config)
        self.axis = self.self_attention.axis
        hidden, width = config.hidden_size, config.ffn_hidden_size
        outputs = 2 * width if self.gated else width
        self.linear_fc1 = _Column(config, self.axis, hidden, outputs, False, config.init_method)
        self.linear_fc2 = _Row(
            config, self.axis, width, hidden, True, config.output_layer_init_method
        )

    def forward(
        self, hidden_states: Halves, attention_mask: Tensor | None, rotary_pos_emb: Any = None
    ) -> Halves:
        """Two halves `[sequence, batch, hidden]` to two of the same shapes; other arguments as of `ShardedAttention`."""

        def attend(x: Tensor, waits: tuple[Pending, Pending]) -> Tensor:
            return self.self_attention(x, attention_mask, waits, rotary_pos_emb)

        halves = self._in_turn(
            hidden_states, self.input_layernorm, attend, self.self_attention.dense
        )
        return self._in_turn(halves, self.post_attention_layernorm, self._mlp, self.linear_fc2)

    def _mlp(self, x: Tensor, waits: tuple[Pending, Pending]) -> Tensor:
        middle = self.linear_fc1(x, waits[0])
        if self.gated:
            gate, values = middle.chunk(2, -1)
            middle = functional.silu(gate) * values
        else:
            middle = functional.gelu(middle)
        return self.linear_fc2(middle, waits[1])

    def _in_turn(
        self, halves: Halves, norm: nn.Module, apply: Callable[..., Tensor], last: _Divided
    ) -> Halves:
        waits = [(Pending(), Pending()) for _ in halves]
        normed = [norm(half) for half in halves]
        pairs = zip(normed, waits, strict=True)
        marked = [mark(half, self.axis, wait[0]) for half, wait in pairs]
        sums = [apply(half, wait) for half, wait in zip(marked, waits, strict=True)]
        found = []
        for total, wait, half, before in zip(sums, waits, halves, normed, strict=True):
            out = finish_sum(total, wait[1])
            out = out if last.bias is None else out + last.bias
            out = functional.dropout(out, self.dropout, self.training)
            found.append(out + (before if self.after_norm else half))
        return found[0], found[1]


class DominoTransformer(nn.Module):
    """Layers, and the last norm.

    Args:
        config: see `DominoTransformerLayer`, and `num_layers`.
        mpu, apply_rotary_pos_emb: see `ShardedAttention`.
        model_type: must be `encoder_or_decoder`.
        layer_type, self_attn_mask_type, drop_path_rate: of the layers.
        post_layer_norm: there is a last norm,
        post_process: on the stage where the model ends.
        pre_process: the input comes by `forward`; otherwise by `set_input_tensor`.
    """

    def __init__(
        self,
        config: Any,
        mpu: Any,
        apply_rotary_pos_emb: Callable[..., Tensor],
        model_type: ModelType,
        layer_type: LayerType = LayerType.encoder,
        self_attn_mask_type: AttnMaskType = AttnMaskType.causal,
        post_layer_norm: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if getattr(model_type, "name", model_type) != ModelType.encoder_or_decoder.name:
            _refuse("an encoder and a decoder together")
        self.pre_process, self.input_tensor = pre_process, None
        kinds = (layer_type, self_attn_mask_type, drop_path_rate)
        self.layers = nn.ModuleList(
            DominoTransformerLayer(config, mpu, apply_rotary_pos_emb, number + 1, *kinds)
            for number in range(config.num_layers)
        )
        self.final_layernorm = _norm(config) if post_process and post_layer_norm else None

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """The input of a stage that is not the first."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        rotary_pos_emb: Any = None,
    ) -> Tensor:
        """`[sequence, batch, hidden]` to the same; other arguments as of `ShardedAttention`.

        Raises:
            ValueError: the batch has fewer than two samples.
        """
        given = hidden_states if self.pre_process else self.input_tensor
        if given is None or given.shape[1] < 2:
            raise ValueError(
                explain(
                    "a batch is divided into two halves",
                    got="no input" if given is None else f"{given.shape[1]} samples",
                    expected="two or more",
                )
            )
        first, second = given.chunk(2, 1)
        masks = attention_mask
        if masks is not None and masks.shape[0] > 1 and not self._causal():
            raise NotImplementedError(
                explain(
                    "masks that differ from sample to sample are not available",
                    fix="Use causal attention, or one mask for all.",
                )
            )
        halves = (first, second)
        for layer in self.layers:
            halves = layer(halves, masks, rotary_pos_emb)
        output = torch.cat(halves, 1)
        return output if self.final_layernorm is None else self.final_layernorm(output)

    def _causal(self) -> bool:
        return all(
            layer.self_attention.mask_type is AttnMaskType.causal  # type: ignore[union-attr]
            for layer in self.layers
        )


def _norm(config: Any) -> nn.LayerNorm:
    device = get_accelerator().current_device_name()
    return nn.LayerNorm(
        config.hidden_size, config.layernorm_epsilon, dtype=config.params_dtype, device=device
    )


def _stream_of(axis: Axis) -> Any:
    """Random numbers that differ from rank to rank, if Megatron's streams have been seeded."""
    tracker = get_cuda_rng_tracker()
    return tracker.fork() if axis.size > 1 and tracker.get_states() else contextlib.nullcontext()


def _refuse(what: str) -> None:
    raise NotImplementedError(explain(f"Domino is not available for {what}"))
