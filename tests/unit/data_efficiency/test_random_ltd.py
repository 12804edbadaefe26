# SPDX-License-Identifier: Apache-2.0
"""Random layer-wise token dropping: the tokens, the gradients, the layers and an engine, against plain indexing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.ops.random_ltd import (
    GatherTokens,
    ScatterTokens,
    bert_sample_tokens,
    gpt_sample_tokens,
)
from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop
from deepspeed.runtime.data_pipeline.data_routing.helper import (
    convert_to_random_ltd,
    save_without_random_ltd,
)
from deepspeed.runtime.data_pipeline.data_routing.scheduler import RandomLTDScheduler

LTD = {
    "enabled": True,
    "total_layer_num": 3,
    "random_ltd_layer_num": 1,
    "random_ltd_layer_id": [1],
    "model_mask_name": "attention_mask",
    "model_type": "decoder",
    "hidden_state_order": "batch_seq_dim",
    "random_ltd_schedule": {
        "min_value": 4,
        "max_value": 12,
        "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 4, "seq_per_step": 2},
    },
    "global_batch_size": 2,
    "micro_batch_size": 2,
}


def test_the_schedule_keeps_ever_more_tokens_and_counts_them():
    scheduler = RandomLTDScheduler(LTD)
    kept = []
    for step in (0, 0, 1, 2, 3, 4, 5):  # the same step again is not counted again
        scheduler.update_seq(step)
        kept.append(scheduler.get_current_seq())
    assert kept == [4, 4, 6, 8, 10, 12, 12]
    tokens = sum(2 * (k + 2 * 12) for k in (4, 6, 8, 10, 12, 12))
    assert scheduler.state["consumed_layer_tokens"] == tokens
    other = RandomLTDScheduler(LTD)
    other.load_state_dict(scheduler.state_dict())
    assert other.get_state() == scheduler.get_state()
    assert RandomLTDScheduler(LTD).get_total_layer_tokens(6) == tokens


def test_what_the_schedule_cannot_do_is_refused():
    with pytest.raises(NotImplementedError, match="layer_token_lr_schedule"):
        RandomLTDScheduler(LTD | {"layer_token_lr_schedule": {"enabled": True}})
    with pytest.raises(KeyError, match="total_layer_num"):
        RandomLTDScheduler({key: LTD[key] for key in LTD if key != "total_layer_num"})
    rooted = LTD | {
        "random_ltd_schedule": LTD["random_ltd_schedule"] | {"schedule_type": "fixed_root"}
    }
    with pytest.raises(RuntimeError, match="Unsupported random LTD"):
        RandomLTDScheduler(rooted).update_seq(1)
    with pytest.raises(ValueError, match="model_type"):
        RandomLayerTokenDrop(nn.Identity()).init_config(
            LTD | {"model_type": "both"}, RandomLTDScheduler(LTD), 0
        )


def test_drawn_tokens_are_sorted_different_and_any():
    torch.manual_seed(0)
    index, mask = gpt_sample_tokens(3, 8, 500, layers=2)
    assert index.shape == (2, 500, 3) and index.dtype == torch.int32 and mask is None
    assert (index[..., 1:] > index[..., :-1]).all()
    shares = torch.bincount(index.flatten(), minlength=8) / index.numel()
    # 3000 draws: one eighth each, within four standard deviations of sqrt(7 / 64 / 3000)
    assert (shares - 1 / 8).abs().max() < 4 * 0.00604
    with pytest.raises(ValueError, match="tokens to keep"):
        gpt_sample_tokens(9, 8, 1)


def test_masks_are_cut_to_the_kept_tokens():
    torch.manual_seed(0)
    mask = torch.randn(2, 3, 8, 8)
    index, cut = bert_sample_tokens(5, 8, 2, layers=2, attn_mask=mask)
    for layer in range(2):
        for sample in range(2):
            at = index[layer, sample].long()
            assert torch.equal(cut[layer, sample], mask[sample][:, at][:, :, at])
    index, cut = bert_sample_tokens(5, 8, 2, attn_mask=mask[:, :1, :1])  # one row for all
    assert torch.equal(cut[0, 1, 0, 0], mask[1, 0, 0, index[0, 1].long()])
    index, cut = gpt_sample_tokens(5, 8, 2, attn_mask=mask[:, 0, 0])
    assert torch.equal(cut[1], mask[1, 0, 0, index[0, 1].long()])
    causal = torch.ones(1, 1, 8, 8).tril()
    assert torch.equal(gpt_sample_tokens(5, 8, 2, attn_mask=causal)[1], causal[:, :, :5, :5])
    with pytest.raises(ValueError, match="does not fit"):
        gpt_sample_tokens(5, 8, 2, attn_mask=torch.ones(2, 7))


@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_go_out_and_come_back_with_their_gradients(batch_first):
    torch.manual_seed(0)
    whole = torch.randn(
        *((2, 6) if batch_first else (6, 2)), 3, dtype=torch.float64, requires_grad=True
    )
    kept_weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    index = gpt_sample_tokens(4, 6, 2)[0][0]

    def dropped(whole, weight):
        past, kept = GatherTokens.apply(whole, index, batch_first)
        return ScatterTokens.apply(past * 2, torch.tanh(kept @ weight), index, batch_first)

    def plain(whole, weight):
        inside = torch.zeros(2, 6, dtype=torch.bool).scatter(1, index.long(), True)
        inside = (inside if batch_first else inside.t())[..., None]
        return torch.where(inside, torch.tanh(whole @ weight), whole * 2)

    torch.testing.assert_close(dropped(whole, kept_weight), plain(whole, kept_weight))
    assert torch.autograd.gradcheck(dropped, (whole, kept_weight))


class Block(nn.Module):
    """Adds to each token a mean of those that its mask shows."""

    def __init__(self, width=8):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.seen = 0

    def forward(self, hidden_states, past=None, attention_mask=None, position_ids=None):
        self.seen = hidden_states.shape[1]
        if position_ids is not None:
            self.positions = position_ids
        shown = attention_mask[:, 0].float()
        means = shown @ self.mix(hidden_states) / shown.sum(-1, keepdim=True)
        return hidden_states + means, past


class Model(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x):
        mask = torch.ones(x.shape[0], 1, x.shape[1], x.shape[1]).tril()
        for block in self.blocks:
            x, _ = block(x, None, attention_mask=mask, position_ids=torch.arange(x.shape[1])[None])
        return x


def test_a_wrapped_layer_sees_kept_tokens_and_passes_the_others():
    torch.manual_seed(0)
    scheduler = RandomLTDScheduler(LTD)
    layer = RandomLayerTokenDrop(Block())
    layer.init_config(LTD, scheduler, 1)
    x = torch.randn(2, 10, 8)
    mask = torch.ones(2, 1, 10, 10).tril()
    past = object()
    out, other = layer(x, past, mask, position_ids=torch.arange(10)[None])
    assert layer.random_ltd_layer.seen == 4 and other is past and out.shape == x.shape
    at = layer.random_ltd_layer.positions.long()  # the kept tokens have kept their positions
    assert at.shape == (2, 4)
    changed = (out != x).any(-1)
    assert torch.equal(changed, torch.zeros(2, 10, dtype=torch.bool).scatter(1, at, True))
    kept = torch.stack([x[n, at[n]] for n in range(2)])
    alone, _ = layer.random_ltd_layer(kept, None, torch.ones(2, 1, 4, 4).tril())
    torch.testing.assert_close(torch.stack([out[n, at[n]] for n in range(2)]), alone)
    layer.eval()
    whole, _ = layer(x, None, mask)
    torch.testing.assert_close(whole, layer.random_ltd_layer(x, None, mask)[0])


def start(stage, tmp=None):
    torch.manual_seed(0)
    model = Model()
    routing = {"enabled": True, "random_ltd": copy.deepcopy(LTD)}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": stage},
            "data_efficiency": {"enabled": True, "data_routing": routing},
        },
    )
    return convert_to_random_ltd(engine, Block)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_engine_drops_tokens_and_goes_on_from_a_checkpoint(tmp_path, stage):
    engine = start(stage)
    x = torch.randn(2, 12, 8)

    def train(engine, steps):
        seen = []
        for _ in range(steps):
            engine.backward(engine(x).square().mean())
            engine.step()
            blocks = engine.module.blocks
            seen.append([blocks[0].seen, blocks[1].random_ltd_layer.seen, blocks[2].seen])
        return seen

    assert train(engine, 2) == [[12, 4, 12], [12, 6, 12]]
    engine.save_checkpoint(str(tmp_path))
    assert train(engine, 3) == [[12, 8, 12], [12, 10, 12], [12, 12, 12]]
    other = start(stage)
    other.load_checkpoint(str(tmp_path))
    assert other.random_ltd_scheduler.state["current_steps"] == 1
    assert train(other, 1) == [[12, 8, 12]]
    names = save_without_random_ltd(engine.module)
    assert list(names) == list(Model().state_dict())


def test_layers_that_are_not_there_are_refused():
    engine = start(0)
    with pytest.raises(ValueError, match="does not have"):
        convert_to_random_ltd(engine, nn.Conv2d)
    plain, _, _, _ = deepspeed.initialize(
        model=nn.Linear(2, 2), config={"train_micro_batch_size_per_gpu": 1}
    )
    with pytest.raises(ValueError, match="not configured"):
        convert_to_random_ltd(plain, nn.Linear)
