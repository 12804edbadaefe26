# SPDX-License-Identifier: Apache-2.0
"""Weights by policy, small layers and parts of weights, by their public names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepspeed import module_inject
from deepspeed.module_inject.replace_policy import HFBertLayerPolicy, replace_policies


def bert_layer():
    """Attributes of transformers' `BertLayer`."""
    one = SimpleNamespace
    attention = one(
        self=one(
            query=nn.Linear(8, 8), key=nn.Linear(8, 8), value=nn.Linear(8, 8), num_attention_heads=2
        ),
        output=one(dense=nn.Linear(8, 8), LayerNorm=nn.LayerNorm(8, eps=1e-12)),
    )
    output = one(dense=nn.Linear(16, 8), LayerNorm=nn.LayerNorm(8))
    return one(attention=attention, intermediate=one(dense=nn.Linear(8, 16)), output=output)


def test_a_bert_layer_is_read():
    layer = bert_layer()
    policy = HFBertLayerPolicy(layer)
    assert isinstance(policy, module_inject.DSPolicy) and replace_policies == [HFBertLayerPolicy]
    assert policy.get_hidden_heads() == (8, 2, 1e-12, 16)
    joint, bias, dense, _ = policy.attention(enable_training=True)
    x, own = torch.randn(3, 8), layer.attention.self
    expected = torch.cat([own.query(x), own.key(x), own.value(x)], -1)
    torch.testing.assert_close(nn.functional.linear(x, joint, bias), expected)
    assert joint.requires_grad and dense is layer.attention.output.dense.weight
    assert policy.mlp()[2] is layer.output.dense.weight
    assert policy.layernorm()[0] is layer.attention.output.LayerNorm.weight


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_keeps_its_part(rank):
    slicing = module_inject.ReplaceWithTensorSlicing(mp_size=2)
    slicing.gpu_index = rank
    whole = torch.arange(48.0).view(4, 12)
    half = slice(6 * rank, 6 * rank + 6)
    for shape, expected in (
        ((4, 12), whole),
        ((4, 6), whole[:, half]),
        ((2, 12), whole[2 * rank : 2 * rank + 2]),
    ):
        place = torch.zeros(shape)
        assert torch.equal(slicing.copy(place, whole), expected) and torch.equal(place, expected)
    place = torch.zeros(4, 6)
    kept = slicing.strided_copy(place, whole, num_splits=3, allocate_tensor=True)
    thirds = [whole[:, 4 * n + 2 * rank : 4 * n + 2 * rank + 2] for n in range(3)]
    assert torch.equal(kept, torch.cat(thirds, 1)) and not place.any()
    assert torch.equal(
        slicing.copy(torch.zeros(3), torch.arange(6.0)), torch.arange(6.0)[3 * rank :][:3]
    )
    for shape in ((2, 6), (4, 7)):
        with pytest.raises(ValueError, match="cannot be taken"):
            slicing.copy(torch.zeros(shape), whole)


def test_small_layers():
    norm, x = module_inject.Normalize(4), torch.randn(2, 4)
    torch.testing.assert_close(norm(x), nn.functional.layer_norm(x, (4,)))
    assert norm(x.half()).dtype == torch.float16
    table = module_inject.EmbeddingLayer(weight=nn.Parameter(torch.arange(6.0).view(3, 2)))
    assert table(torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]
    assert module_inject.EmbeddingLayer((3, 2)).weight.dtype == torch.float16


def test_what_is_not_built_is_named():
    given = torch.ones(2)
    assert torch.equal(module_inject.GroupQuantizer(q_int8=False).quantize(given), given)
    for call in (
        lambda: module_inject.GroupQuantizer().quantize(given),
        lambda: module_inject.generic_injection(None),
        lambda: module_inject.quantize_transformer_layer(None, None),
    ):
        with pytest.raises(NotImplementedError, match="not available"):
            call()
