# SPDX-License-Identifier: Apache-2.0
"""Which models have a decoder program, and where each family keeps its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .weights import DecoderWeights, Layer, Product, packable

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}
_ROPES = ("default", "linear", "llama3")


class NotFused(Exception):
    """A model that no decoder program can stand for; the message says why."""


def read_weights(model: nn.Module) -> DecoderWeights:
    """Pack a model's weights for its decoder program; the model keeps working on them.

    Args:
        model: a causal language model of transformers, in its dtype and on its device.

    Raises:
        NotFused: its class, or a setting of its configuration, is not covered. Nothing was changed.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise NotFused(f"class {name} is none of {', '.join(FAMILIES)}")
    for module in model.modules():
        home = type(module).__module__.split(".")[0]
        foreign = home not in ("torch", "transformers")
        _need(not foreign, f"it has modules of class {type(module).__name__}, from {home}")
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        _need(not hooked, "its modules have forward hooks, which a fused program would not call")
        linear = isinstance(module, nn.Linear)
        _need(not linear or packable(module), f"it has layers of class {type(module).__name__}")
    _need(
        next(model.parameters()).dtype in (torch.float32, torch.bfloat16, torch.float16),
        "its params are no floating-point numbers of 16 or 32 bits",
    )
    weights = FAMILIES[name](model)
    model._register_state_dict_hook(_unpack)
    return weights


def _unpack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Give a state dict tensors of its own in place of views of packed weights, which few formats can store."""
    copies: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for name, value in state.items():
        if not torch.is_tensor(value) or isinstance(value, nn.Parameter):
            continue
        alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if not (alone and value.is_contiguous()):
            tied = (value.data_ptr(), tuple(value.shape))  # what is tied stays tied
            state[name] = copies.setdefault(
                tied, value.clone(memory_format=torch.contiguous_format)
            )


def _need(holds: bool, why: str) -> None:
    if not holds:
        raise NotFused(why)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    _need(name in _ACTIVATIONS, f"its activation is {name}")
    return _ACTIVATIONS[name]


def _layer_norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: functional.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(module: Any) -> Callable[[Tensor], Tensor]:
    weight, eps = module.weight, module.variance_epsilon

    def norm(x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)

    return norm


def _mlp(up: Product, act: Callable[[Tensor], Tensor], down: Product) -> Callable[[Tensor], Tensor]:
    return lambda x: down(act(up(x)))


def _gated_mlp(
    both: Product, act: Callable[[Tensor], Tensor], down: Product
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        gate, up = both(x).chunk(2, dim=-1)
        return down(act(gate) * up)

    return run


def _gpt2(model: Any) -> DecoderWeights:
    config, body = model.config, model.transformer
    _need(config.scale_attn_weights, "its scale_attn_weights is false")
    _need(not config.scale_attn_by_inverse_layer_idx, "it scales attention by the layer's number")
    _need(not config.add_cross_attention, "it has cross-attention")
    act = _activation(config.activation_function)
    layers = [
        Layer(
            norm_1=_layer_norm(block.ln_1),
            qkv=Product([block.attn.c_attn]),
            out=Product([block.attn.c_proj]),
            norm_2=_layer_norm(block.ln_2),
            mlp=_mlp(Product([block.mlp.c_fc]), act, Product([block.mlp.c_proj])),
        )
        for block in body.h
    ]
    return DecoderWeights(
        embed=lambda ids, positions: body.wte(ids) + body.wpe(positions),
        layers=layers,
        norm=_layer_norm(body.ln_f),
        head=_head(model, body.wte),
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        positions=config.n_positions,
    )


def _head(model: Any, embedding: nn.Module) -> Product:
    """The last product; a tied embedding stays tied."""
    tied = model.lm_head.weight is embedding.weight
    head = Product([model.lm_head])
    if tied:
        embedding.weight = model.lm_head.weight
    return head


def _opt(model: Any) -> DecoderWeights:
    config, body = model.config, model.model.decoder
    _need(config.do_layer_norm_before, "it normalises after each layer")
    _need(body.project_in is None and body.project_out is None, "it projects its embeddings")
    _need(body.final_layer_norm is not None, "it has no last norm")
    _need(config.layer_norm_elementwise_affine, "its norms have no weights")
    act = _activation(config.activation_function)
    table = body.embed_positions
    layers = [
        Layer(
            norm_1=_layer_norm(block.self_attn_layer_norm),
            qkv=Product([block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]),
            out=Product([block.self_attn.out_proj]),
            norm_2=_layer_norm(block.final_layer_norm),
            mlp=_mlp(Product([block.fc1]), act, Product([block.fc2])),
        )
        for block in body.layers
    ]

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        return body.embed_tokens(ids) + functional.embedding(positions + table.offset, table.weight)

    return DecoderWeights(
        embed=embed,
        layers=layers,
        norm=_layer_norm(body.final_layer_norm),
        head=_head(model, body.embed_tokens),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        positions=config.max_position_embeddings,
    )


def _llama(model: Any) -> DecoderWeights:
    config, body = model.config, model.model
    _check_llama(config)
    act = _activation(config.hidden_act)
    layers = [
        Layer(
            norm_1=_rms_norm(block.input_layernorm),
            qkv=Product([block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]),
            out=Product([block.self_attn.o_proj]),
            norm_2=_rms_norm(block.post_attention_layernorm),
            mlp=_gated_mlp(
                Product([block.mlp.gate_proj, block.mlp.up_proj]),
                act,
                Product([block.mlp.down_proj]),
            ),
        )
        for block in body.layers
    ]
    rotary = getattr(body, "rotary_emb", None) or body.layers[0].self_attn.rotary_emb

    older = "seq_len" in inspect.signature(rotary.forward).parameters

    def rotate(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = body.embed_tokens.weight[:1]
        if older:
            return rotary(like, seq_len=len(positions))
        cos, sin = rotary(like, positions[None])
        return cos[0], sin[0]

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderWeights(
        embed=lambda ids, positions: body.embed_tokens(ids),
        layers=layers,
        norm=_rms_norm(body.norm),
        head=_head(model, body.embed_tokens),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=width,
        positions=config.max_position_embeddings,
        rotate=rotate,
    )


def _check_llama(config: Any) -> None:
    _need(getattr(config, "pretraining_tp", 1) == 1, "its pretraining_tp is not 1")
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    _need(kind in _ROPES, f"its rotary embedding is of type {kind}")
    windowed = getattr(config, "sliding_window", None) is not None
    windowed = windowed and getattr(config, "use_sliding_window", True)
    _need(not windowed, "it attends within a sliding window")


# class of the model -> how its weights are read
FAMILIES: dict[str, Callable[[Any], DecoderWeights]] = {
    "GPT2LMHeadModel": _gpt2,
    "OPTForCausalLM": _opt,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
}
