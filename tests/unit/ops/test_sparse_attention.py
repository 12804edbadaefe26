# SPDX-License-Identifier: Apache-2.0
"""Sparse attention: patterns as pictures, and values and gradients against dense attention with a mask."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepspeed.ops.sparse_attention import (
    BertSparseSelfAttention,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    MatMul,
    Softmax,
    SparseAttentionUtils,
    SparseSelfAttention,
    VariableSparsityConfig,
)

PAST = "unidirectional"
PICTURES = [
    (
        FixedSparsityConfig,
        {"num_local_blocks": 3},
        "###..## ###..## ###..## ..##### ..##### ..##### ..#..##",
    ),
    (
        FixedSparsityConfig,
        {"num_local_blocks": 2, "attention": PAST},
        "#..... ##.... .##... .###.. .#.##. .#.###",
    ),
    (
        FixedSparsityConfig,
        {"num_local_blocks": 3, "horizontal_global_attention": True},
        "###..# ###..# ###### ..#### ..#### ######",
    ),
    (
        VariableSparsityConfig,
        {"local_window_blocks": [1, 2], "global_block_indices": [4], "attention": PAST},
        "#..... .#.... .##... ...#.. ...##. ....##",
    ),
    (
        VariableSparsityConfig,
        {
            "local_window_blocks": [2],
            "global_block_indices": [1],
            "global_block_end_indices": [3],
            "horizontal_global_attention": True,
        },
        "###... ###### ###### .###.. .##.## .##.##",
    ),
    (BigBirdSparsityConfig, {"num_random_blocks": 0}, "###### ###... ####.. #.###. #..### #...##"),
    (
        BigBirdSparsityConfig,
        {"num_random_blocks": 0, "attention": PAST},
        "#..... ##.... ###... #.##.. #..##. #...##",
    ),
    (
        BSLongformerSparsityConfig,
        {"global_block_indices": [3]},
        "##.#.. ####.. .###.. ###### ...### ...###",
    ),
    (
        LocalSlidingWindowSparsityConfig,
        {"num_sliding_window_blocks": 5},
        "#..... ##.... ###... .###.. ..###. ...###",
    ),
    (DenseSparsityConfig, {}, "## ##"),
]


def picture(layout):
    return " ".join("".join(".#"[int(block)] for block in row) for row in layout)


@pytest.mark.parametrize(("kind", "options", "expected"), PICTURES)
def test_patterns(kind, options, expected):
    config = kind(2, 4, **options)
    layout = config.make_layout(4 * len(expected.split()))
    assert layout.dtype == torch.int64
    assert picture(layout[0]) == picture(layout[1]) == expected


def test_heads_may_differ():
    config = FixedSparsityConfig(
        2, 4, different_layout_per_head=True, num_local_blocks=2, num_different_global_patterns=2
    )
    first, second = config.make_layout(16)
    assert picture(first) == "##.# ##.# .### .###" and picture(second) == "###. ###. #.## #.##"


@pytest.mark.parametrize("attention", ["bidirectional", PAST])
def test_random_blocks_come_in_each_row(attention):
    random.seed(0)
    config = BigBirdSparsityConfig(1, 1, num_random_blocks=3, attention=attention)
    layout = config.make_layout(32)[0]
    assert (layout.sum(1) >= torch.arange(1, 33).clamp(max=3)).all()
    assert layout[3:].sum() > 29 * 4 and not torch.equal(layout[8, 1:7], layout[9, 1:7])
    assert attention != PAST or layout.triu(1).sum() == 0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DenseSparsityConfig(1).make_layout(17), ValueError, "17 positions"),
        (
            lambda: FixedSparsityConfig(1, num_local_blocks=5, num_global_blocks=2),
            ValueError,
            "5 and 2",
        ),
        (lambda: FixedSparsityConfig(1, num_different_global_patterns=2), ValueError, "at most 1"),
        (lambda: FixedSparsityConfig(1, attention="sideways"), NotImplementedError, "sideways"),
        (
            lambda: VariableSparsityConfig(1, attention=PAST, horizontal_global_attention=True),
            ValueError,
            "horizontal",
        ),
        (
            lambda: BSLongformerSparsityConfig(1, global_block_end_indices=[0]),
            ValueError,
            "each behind its start",
        ),
        (
            lambda: BigBirdSparsityConfig(1, num_sliding_window_blocks=5).make_layout(64),
            ValueError,
            "more sliding window blocks",
        ),
        (lambda: DenseSparsityConfig(1, 0), ValueError, "block is too small"),
        (lambda: FixedSparsityConfig(1, num_global_blocks=0), ValueError, "num_global_blocks is"),
        (
            lambda: VariableSparsityConfig(1, local_window_blocks=[2, 0]),
            ValueError,
            "window_blocks",
        ),
        (lambda: VariableSparsityConfig(1, local_window_blocks=[]), ValueError, "window_blocks"),
        (lambda: SparseSelfAttention(attn_mask_mode="or"), ValueError, "unknown mode"),
        (lambda: MatMul(torch.ones(1, 1, 1), 4, "ddd"), NotImplementedError, "sdd, dsd and dds"),
        (
            lambda: SparseAttentionUtils.extend_position_embedding(nn.Linear(2, 2), 9),
            ValueError,
            "BERT",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def dense_mask(layout, block):
    return layout.repeat_interleave(block, 1).repeat_interleave(block, 2).bool()


def dense_attention(q, k, v, layout, block, added=0.0):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + added
    seen = dense_mask(layout, block) & (scores > float("-inf"))
    scores = scores.masked_fill(~seen, float("-inf"))
    dead = ~seen.any(-1, keepdim=True)
    return (scores.masked_fill(dead, 0.0).softmax(-1) * ~dead) @ v


def test_a_mask_may_be_the_same_for_all_keys():
    q = torch.randn(2, 2, 16, 5)
    layer = SparseSelfAttention(BSLongformerSparsityConfig(2, 4), max_seq_length=16)
    found = layer(q, q, q, rpe=torch.randn(2, 16, 1))
    torch.testing.assert_close(found, layer(q, q, q))


def test_decoders_are_not_given_attention_to_later_tokens():
    model = nn.Module()
    model.bert, model.config = nn.Module(), SimpleNamespace(is_decoder=True)
    with pytest.raises(ValueError, match="is_decoder"):
        SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 32)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        FixedSparsityConfig(2, 4, num_local_blocks=2),
        FixedSparsityConfig(
            2,
            4,
            different_layout_per_head=True,
            num_local_blocks=2,
            num_different_global_patterns=2,
        ),
        BSLongformerSparsityConfig(2, 4),
        LocalSlidingWindowSparsityConfig(2, 4),
    ],
)
def test_attention_is_dense_attention_where_blocks_are(config, masks):
    torch.manual_seed(0)
    q, k, v = (numbers(3, 2, 24, 5) for _ in range(3))
    layer = SparseSelfAttention(config, max_seq_length=32)
    added, given, inputs = 0.0, {}, [q, k, v]
    if masks:
        rpe = numbers(2, 24, 24)
        padding = torch.zeros(3, 24, dtype=torch.float64)
        padding[1, 20:] = float("-inf")
        kept = torch.rand(24, 24) > 0.3
        kept[7] = False  # a query that sees nothing
        given = {"rpe": rpe, "key_padding_mask": padding, "attn_mask": kept.double()}
        added = rpe + padding[:, None, None] + torch.zeros(24, 24).masked_fill(~kept, float("-inf"))
        inputs.append(rpe)
    found = layer(q, k.transpose(-1, -2), v, **given)
    expected = dense_attention(q, k, v, layer.get_layout(24), 4, added)
    torch.testing.assert_close(found, expected)
    assert not masks or not found[:, :, 7].any()
    seed = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, inputs, seed),
        torch.autograd.grad(expected, inputs, seed),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_in_small_floats(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 64, 8).to(dtype) for _ in range(3))
    layer = SparseSelfAttention(max_seq_length=64)
    found = layer(q, k, v)
    expected = dense_attention(q.double(), k.double(), v.double(), layer.master_layout, 16)
    # scores below 8 and values below 4, rounded
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol={4: 1e-6, 2: 0.05}[dtype.itemsize]
    )
    with pytest.raises(ValueError, match="max_seq_length=64"):
        layer(*(torch.zeros(1, 4, 80, 8),) * 3)
    with pytest.raises(ValueError, match="number of heads"):
        layer(*(torch.zeros(1, 2, 64, 8),) * 3)


def to_blocks(dense, layout, block):
    return torch.stack(
        [
            dense[:, h, i * block : (i + 1) * block, j * block : (j + 1) * block]
            for h, i, j in layout.nonzero().tolist()
        ],
        1,
    )


@pytest.mark.parametrize(
    ("mode", "trans_a", "trans_b"),
    list(itertools.product(("sdd", "dsd", "dds"), (False, True), (False, True))),
)
def test_products(mode, trans_a, trans_b):
    torch.manual_seed(1)
    block, rows, inner, columns = 2, 6, 8, 4
    a = numbers(2, 3, *((inner, rows) if trans_a else (rows, inner)))
    b = numbers(2, 3, *((columns, inner) if trans_b else (inner, columns)))
    stored = {"sdd": (rows, columns), "dsd": a.shape[2:], "dds": b.shape[2:]}[mode]
    layout = torch.randint(0, 2, (3, *(side // block for side in stored)))
    layout[0, 0, 0] = 1
    mask = dense_mask(layout, block)
    given = [to_blocks(t, layout, block) if mode[n] == "s" else t for t, n in ((a, 1), (b, 2))]
    found = MatMul(layout, block, mode, trans_a, trans_b)(*given)
    full = [t * mask if mode[n] == "s" else t for t, n in ((a, 1), (b, 2))]
    expected = (full[0].transpose(2, 3) if trans_a else full[0]) @ (
        full[1].transpose(2, 3) if trans_b else full[1]
    )
    expected = to_blocks(expected, layout, block) if mode == "sdd" else expected
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad(found, (a, b), seed),
        torch.autograd.grad(expected, (a, b), seed),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_softmax_over_blocks():
    torch.manual_seed(2)
    layout, block = torch.randint(0, 2, (2, 3, 4)), 2
    layout[0, 1] = 0  # rows in no block
    x = numbers(3, 2, 6, 8)
    padding = torch.zeros(3, 8, dtype=torch.float64)
    padding[2, 5:] = float("-inf")
    kept = torch.rand(6, 8) > 0.4
    rpe = numbers(1, 2, 6, 8)
    scores = x * 0.5 + rpe + padding[:, None, None]
    seen = dense_mask(layout, block) & kept & (padding == 0)[:, None, None]
    dead = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, float("-inf")).masked_fill(dead, 0.0)
    expected = to_blocks(scores.softmax(-1) * ~dead, layout, block)
    found = Softmax(layout, block)(
        to_blocks(x, layout, block), 0.5, rpe, padding, kept, attn_mask_mode="mul"
    )
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (x, rpe), seed),
        torch.autograd.grad(expected, (x, rpe), seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_with_all_blocks_is_the_model_itself(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 30, "max_position_embeddings": 18}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    try:
        model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    except ImportError as error:  # of something beside it that is broken
        pytest.skip(f"transformers cannot import its models here: {error}")
    ids = torch.randint(2, 30, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    expected = model(ids, attention_mask=mask).logits
    utils = SparseAttentionUtils
    utils.replace_model_self_attention_with_sparse_self_attention(
        utils.extend_position_embedding(model, 32), 32, DenseSparsityConfig(4, 4)
    )
    pad, long_ids, long_mask, *_ = utils.pad_to_block_size(4, ids, mask, None, None, None, 1, None)
    assert pad == 3 and long_ids.shape == long_mask.shape == (2, 16)
    found = utils.unpad_sequence_output(pad, model(long_ids, attention_mask=long_mask).logits)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :9], expected[1, :9], rtol=1e-4, atol=1e-5)
    assert model(torch.ones(1, 28, dtype=torch.long)).logits.shape == (1, 28, 30)


def test_embeddings_are_padded_too():
    table = nn.Embedding(5, 3)
    embeds = torch.zeros(2, 5, 3)
    pad, ids, mask, *_, longer = SparseAttentionUtils.pad_to_block_size(
        4, None, None, None, None, embeds, 4, table
    )
    assert (pad, ids) == (3, None) and mask.sum() == 10
    assert torch.equal(longer[:, 5:], table.weight[4].expand(2, 3, 3))
    assert torch.equal(SparseAttentionUtils.unpad_sequence_output(0, embeds), embeds)


def test_berts_attention_alone():
    config = type("Config", (), {"hidden_size": 8, "num_attention_heads": 2})
    layer = BertSparseSelfAttention(config, FixedSparsityConfig(2, 4))
    out = layer(torch.randn(2, 8, 8), torch.zeros(2, 1, 1, 8))
    assert out.shape == (2, 8, 8)
    out.sum().backward()
    assert layer.query.weight.grad is not None
