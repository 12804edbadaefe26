# SPDX-License-Identifier: Apache-2.0
"""Sequences split over ranks: the attention, the gradients and the training of whole ones."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    UlyssesSPAttentionHF,
    UlyssesSPDataLoaderAdapter,
)
from deepspeed.sequence.cross_entropy import vocab_sequence_parallel_cross_entropy
from deepspeed.sequence.layer import DistributedAttention, single_all_to_all
from deepspeed.utils import groups
from tests.helpers.long_sequences import check_attention, check_loss


def attend(query, key, value):
    """Causal attention of `[batch, sequence, heads, size]`, key-value heads repeated."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def split_attention(rank, heads, kv_heads, batch_first):
    ranks = torch.distributed.get_world_size()
    torch.manual_seed(0)
    whole = [
        torch.randn(2, 4 * ranks, n, 3, dtype=torch.float64, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]
    expected = attend(*whole)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), whole)
    mine = [x.detach()[:, 4 * rank : 4 * rank + 4].clone().requires_grad_() for x in whole]
    if batch_first:
        layer, given = DistributedAttention(attend, None, 2, 1), mine
    else:

        def turned(q, k, v):
            return attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

        layer, given = DistributedAttention(turned, None), [x.transpose(0, 1) for x in mine]
    got = layer(*given, 0 if batch_first else 1)
    got = got if batch_first else got.transpose(0, 1)
    part = slice(4 * rank, 4 * rank + 4)
    torch.testing.assert_close(got, expected[:, part])
    (got * weight[:, part]).sum().backward()
    for tensor, grad in zip(mine, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, grad[:, part])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 3), (6, 3)])
def test_attention_over_split_sequences_is_that_of_whole_ones(ranks2, heads, kv_heads, batch_first):
    ranks2.run(split_attention, heads, kv_heads, batch_first)


def too_few_heads(rank):
    x = torch.randn(1, 4, 1, 2)
    with pytest.raises(ValueError, match="1 heads over 1 key-value heads on 2 ranks"):
        DistributedAttention(attend, None, 2, 1)(x, x, x, 0)
    with pytest.raises(ValueError, match="3 positions on 2 ranks"):
        single_all_to_all(torch.randn(1, 3, 2, 2), 1, 2, 0, None)
    there = single_all_to_all(
        torch.arange(24.0).view(1, 4, 3, 2) + 100 * rank, 2, 1, 0, None, num_kv_heads=3
    )
    back = single_all_to_all(there, 1, 2, 0, None, num_kv_heads=3)
    assert torch.equal(single_all_to_all(there, 1, 2, 0, None), back), "the ranks tell their heads"
    return there.shape, back - 100 * rank


def test_heads_that_do_not_split_are_refused_and_uneven_ones_come_back(ranks2):
    (first, back), (second, other) = ranks2.run(too_few_heads)
    assert (tuple(first), tuple(second)) == ((1, 8, 2, 2), (1, 8, 1, 2))
    for values in (back, other):
        assert torch.equal(values, torch.arange(24.0).view(1, 4, 3, 2))


def split_loss(rank):
    torch.manual_seed(0)
    logits = torch.randn(6, 2, 5, requires_grad=True)
    target = torch.randint(0, 5, (6, 2))
    target[1] = -100
    whole = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    (wanted,) = torch.autograd.grad(whole.sum() * 2, logits)
    part = slice(3 * rank, 3 * rank + 3)
    mine = logits.detach()[part].clone().requires_grad_()
    losses = vocab_sequence_parallel_cross_entropy(mine, target[part], None)
    torch.testing.assert_close(losses, whole.view(6, 2))
    (losses.sum() * 2).backward()
    torch.testing.assert_close(mine.grad, wanted[part])
    mean = vocab_sequence_parallel_cross_entropy(mine, target[part], None, reduction="mean")
    torch.testing.assert_close(mean, whole.sum() / 10)


def test_loss_of_a_split_sequence_is_gathered(ranks2):
    ranks2.run(split_loss)


def step_once(rank, stage, how):
    groups.reset()
    torch.manual_seed(0)
    net = nn.Linear(4, 1, bias=False)
    nn.init.ones_(net.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    given = {}
    if how == "mpu":
        parallel_state_sp.initialize_sequence_parallel(2)
        given["mpu"] = parallel_state_sp
    elif how == "config":
        config |= {"sequence_parallel_size": 2, "data_parallel_size": 1}
    else:
        given["mesh_param"] = (1, 2)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=1.0), config=config, **given
    )
    engine.backward(engine(torch.full((1, 4), rank + 1.0)).sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        weight = net.weight.detach().flatten()[0].item()
    sizes = (engine.sequence_parallel_size, engine.seq_dp_world_size, engine.train_batch_size())
    engine.destroy()
    groups.reset()
    return weight, sizes


@pytest.mark.parametrize("how", ["mpu", "config", "mesh_param"])
@pytest.mark.parametrize("stage, weight", [(0, -2.0), (1, -2.0), (2, -2.0), (3, -0.5)])
def test_gradients_of_a_sequence_add_up_below_stage_3_and_are_averaged_there(
    ranks2, stage, weight, how
):
    """The gradients are 1 and 2: upstream's steps, which its users' losses are scaled for."""
    for got, sizes in ranks2.run(step_once, stage, how):
        assert got == weight
        assert sizes == (2, 2, 1)


def need_split_attention():
    try:
        from transformers import LlamaForCausalLM  # noqa: F401
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401
    except ImportError as error:
        pytest.skip(f"no transformers with exchangeable attention functions: {error}")


def llama(kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    windows = {"sliding_window": 3} if kv_heads == 2 else {}
    config = (MistralConfig if windows else LlamaConfig)(
        **windows,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return (MistralForCausalLM if windows else LlamaForCausalLM)(config)


def batches_of(rank, ranks, packed):
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(4):
        ids = torch.randint(0, 32, (2, 8), generator=generator)
        labels = ids.clone()
        labels[0, 6:] = -100
        batch = {"input_ids": ids, "labels": labels}
        if packed:
            batch["position_ids"] = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]).expand(2, 8)
        made.append(batch)
    return made[rank::ranks]


def plain_losses(kv_heads, packed):
    net = llama(kv_heads)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for batch in batches_of(0, 1, packed):
        loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def split_training(rank, kv_heads, stage, packed):
    import torch.distributed.nn.functional as collective
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    groups.reset()
    net = llama(kv_heads)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=net,
        core_attn_implementation="sdpa",
        sequence_parallel_size=2,
        micro_batch_size=2,
    )
    group = mpu.get_sequence_parallel_group()
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
        config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}},
        mpu=mpu,
    )
    loader = UlyssesSPDataLoaderAdapter(
        batches_of(rank, 2, packed),
        sp_rank=mpu.get_sequence_parallel_rank(),
        sp_group=group,
        sp_world_size=2,
        device="cpu",
    )
    assert len(loader) == 4
    losses = []
    for batch in loader:
        assert batch["input_ids"].shape == (2, 4) and "labels" not in batch
        counted = (batch["shift_labels"] != -100).sum()
        labels = batch.pop("shift_labels")
        logits = engine(**batch).logits
        loss = net.loss_function(logits, None, net.config.vocab_size, shift_labels=labels)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch renames it; transformers calls it so
            each = collective.all_gather(loss, group=group)
            counts = collective.all_gather(counted, group=group)
        total = sum(a * b for a, b in zip(each, counts, strict=True)) / sum(counts)
        engine.backward(total)
        engine.step()
        losses.append(total.item())
    engine.destroy()
    core = ALL_ATTENTION_FUNCTIONS["sdpa"].ulysses_core
    ALL_ATTENTION_FUNCTIONS["sdpa"] = core
    groups.reset()
    return losses


@pytest.mark.parametrize(
    "kv_heads, stage, packed", [(4, 0, False), (2, 2, False), (1, 3, False), (2, 3, True)]
)
def test_hugging_face_model_trains_on_split_sequences_as_on_whole_ones(
    ranks2, kv_heads, stage, packed
):
    need_split_attention()
    # Adam hides the scale of gradients, and turns the rounding of small ones into steps: 1e-4 seen after 3 steps.
    for losses in ranks2.run(split_training, kv_heads, stage, packed):
        assert losses == pytest.approx(plain_losses(kv_heads, packed), rel=1e-3)


def bad_batches(rank):
    groups.reset()
    parallel_state_sp.initialize_sequence_parallel(2)

    def first(batch):
        loader = UlyssesSPDataLoaderAdapter([batch], rank, None, 2, "cpu")
        return next(iter(loader))

    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="a length of 3 on 2 ranks"):
        first({"input_ids": ids[:, :3]})
    with pytest.raises(ValueError, match="padded on the left"):
        first({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])})
    uneven = [{"input_ids": ids}] * (1 + rank)
    loader = UlyssesSPDataLoaderAdapter(uneven, rank, None, 2, "cpu")
    assert sum(1 for _ in loader) == 2
    groups.reset()


def test_batches_that_do_not_split_are_refused_and_uneven_loaders_end_together(ranks2):
    ranks2.run(bad_batches)


def bad_models(rank):
    net = llama(2)
    register = UlyssesSPAttentionHF.register_with_transformers
    assert register(net, "sdpa", 1, 1) is None
    with pytest.raises(ValueError, match="attn_implementation='sdpa' in the model"):
        register(net, "flash_attention_2", 2, 1)
    with pytest.raises(ValueError, match="unknown attention function"):
        register(net, "sparse", 2, 1)
    with pytest.raises(ValueError, match="4 heads, 2 key-value heads, sequence_parallel_size 3"):
        register(net, "sdpa", 3, 1)
    net.config._attn_implementation = None  # of no model yet: nothing to compare with
    with pytest.raises(ValueError, match="4 heads, 2 key-value heads, sequence_parallel_size 3"):
        register(types.SimpleNamespace(config=net.config), "sdpa", 3, 1)
    with pytest.raises(ValueError, match="seq_length=7"):
        register(net, "sdpa", 2, 1, seq_length=7, seq_length_is_variable=False)


def test_models_that_do_not_split_are_refused(ranks2):
    need_split_attention()
    ranks2.run(bad_models)


def long_sequences(rank):
    group = torch.distributed.new_group([0, 1])
    check_attention(rank, 2, 8, group=group)
    check_attention(rank, 2, 24, kv_heads=2, rotary=4, offload=False, group=group)
    check_loss(rank, 2, 3, group)


def test_chunks_of_a_long_sequence_over_ranks(ranks2):
    ranks2.run(long_sequences)
