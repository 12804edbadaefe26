# SPDX-License-Identifier: Apache-2.0
"""Domino's transformer on any number of ranks against a plain one in float64."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from deepspeed.runtime.domino import overlap
from deepspeed.runtime.domino.transformer import DominoTransformer, ModelType

HIDDEN, HEADS, LAYERS, LENGTH = 8, 4, 2, 5


def config(**changes):
    def init(weight):
        torch.nn.init.normal_(weight, std=0.5)

    values = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "kv_channels": 3,
        "num_layers": LAYERS,
        "ffn_hidden_size": 6,
        "params_dtype": torch.float64,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "layernorm_epsilon": 1e-5,
        "init_method": init,
        "output_layer_init_method": init,
    }
    return SimpleNamespace(**{**values, **changes})


def make(group, turn=lambda x, angles: x * angles, **changes):
    mpu = SimpleNamespace(get_tensor_model_parallel_group=lambda: group)
    kind = ModelType.encoder_or_decoder
    model = DominoTransformer(config(**changes), mpu, turn, kind)
    torch.manual_seed(4)
    with torch.no_grad():
        for param in model.parameters():  # biases and norms, too
            param.copy_(torch.randn(param.shape, dtype=param.dtype) * 0.5 + 0.1)
    return model


def reference(state, x, angles, gated=False, after_norm=False):
    """The whole model by plain operations."""

    def norm(x, name):
        return F.layer_norm(x, (HIDDEN,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for number in range(LAYERS):
        at = f"layers.{number}."
        normed = norm(x, at + "input_layernorm")
        mixed = linear(normed, at + "self_attention.query_key_value").unflatten(-1, (HEADS, 9))
        q, k, v = mixed.split(3, -1)
        scores = torch.einsum("qbnd,kbnd->bnqk", q * angles, k * angles) / 3**0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        context = torch.einsum("bnqk,kbnd->qbnd", weights, v).flatten(2)
        x = (normed if after_norm else x) + linear(context, at + "self_attention.dense")
        normed = norm(x, at + "post_attention_layernorm")
        middle = linear(normed, at + "linear_fc1")
        if gated:
            gate, values = middle.chunk(2, -1)
            middle = F.silu(gate) * values
        else:
            middle = F.gelu(middle)
        x = (normed if after_norm else x) + linear(middle, at + "linear_fc2")
    return norm(x, "final_layernorm")


def own_part(name, values, ranks, rank, gated=False):
    """A rank's part of a whole weight; gates and what they let through are cut each."""
    if gated and "fc1" in name:
        return torch.cat([half.chunk(ranks)[rank] for half in values.chunk(2)])
    if name.endswith(("query_key_value.weight", "query_key_value.bias", "fc1.weight", "fc1.bias")):
        return values.chunk(ranks)[rank]
    if name.endswith(("dense.weight", "fc2.weight")):
        return values.chunk(ranks, 1)[rank]
    return values


def check(rank, ranks, group, batch=3, **changes):
    """Compare values and gradients with the whole model's."""
    alone = torch.distributed.new_group([rank], use_local_synchronization=True)
    whole = {k: v.detach().requires_grad_() for k, v in make(alone, **changes).state_dict().items()}
    model = make(group, **changes)
    own = partial(own_part, ranks=ranks, rank=rank, gated=changes.get("gated_linear_unit", False))
    model.load_state_dict({name: own(name, values).detach() for name, values in whole.items()})
    torch.manual_seed(7)
    x = torch.randn(LENGTH, batch, HIDDEN, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(LENGTH, 1, 1, 1, dtype=torch.float64)
    seed = torch.randn_like(x)
    options = {
        "gated": changes.get("gated_linear_unit", False),
        "after_norm": changes.get("apply_residual_connection_post_layernorm", False),
    }
    expected = reference(whole, x, angles, **options)
    wanted = torch.autograd.grad(expected, [x, *whole.values()], seed)
    found = model(x, None, angles)
    torch.testing.assert_close(found, expected)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(found, [x, *(params[name] for name in whole)], seed)
    torch.testing.assert_close(grads[0], wanted[0])
    for name, one, other in zip(whole, grads[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, own(name, other), msg=name)


def order_of_events(rank, group):
    """What happens in a layer of two ranks: products begin ("p"), sums start ("s") and are waited for ("w")."""
    events = []
    start, linear, wait = overlap.flat.all_reduce_, F.linear, overlap.Pending.wait

    def started(*args, **kwargs):
        events.append("s")
        return start(*args, **kwargs)

    def waited(self):
        events.append("w" if self.handle is not None else "")
        wait(self)

    def multiplied(*args):
        events.append("p")
        return linear(*args)

    layer = make(group).layers[0]
    halves = [torch.randn(LENGTH, 1, HIDDEN, dtype=torch.float64, requires_grad=True)] * 2
    angles = torch.ones(1, dtype=torch.float64)
    try:
        overlap.flat.all_reduce_, overlap.Pending.wait, F.linear = started, waited, multiplied
        out = layer(tuple(halves), None, angles)
        forward = "".join(events)
        events.clear()
        torch.autograd.backward(out, [torch.ones_like(out[0])] * 2)
    finally:
        overlap.flat.all_reduce_, overlap.Pending.wait, F.linear = start, wait, linear
    return forward, "".join(events)
