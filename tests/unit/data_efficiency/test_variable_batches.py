# SPDX-License-Identifier: Apache-2.0
"""Packs of sequences, and learning rates that follow their number."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.data_pipeline.data_sampling import variable_batch_size_and_lr as variable

LENGTHS = [3, 5, 2, 8, 7, 1, 4, 6, 9, 2, 3, 3, 5, 12, 4, 1]


@pytest.mark.parametrize(
    ("options", "packs"),
    [
        ({}, [[0, 1, 2], [3], [4, 5], [6, 7], [8], [9, 10, 11], [12, 14, 15]]),
        (
            {"max_batch_size": 2},
            [[0, 1], [2, 3], [4, 5], [6, 7], [8], [9, 10], [11, 12], [14, 15]],
        ),
        ({"min_batch_size": 3}, [[0, 1, 2], [9, 10, 11], [12, 14, 15]]),
        (
            {"sequence_picking_order": "seqlen"},
            [[5, 15, 2, 9, 0], [10, 11, 6], [14, 1], [12], [7], [4], [3], [8]],
        ),
        (  # python's own shuffle of 16 numbers, without the sequence that is too long
            {"sequence_picking_order": "random", "seed": 1},
            [[2, 10, 0], [14, 6, 5], [3], [8], [7, 11, 15], [1, 12], [9, 4]],
        ),
    ],
    ids=["as they come", "at most 2", "at least 3", "shortest first", "random"],
)
def test_sequences_are_packed_until_the_next_does_not_fit(options, packs):
    found, sizes, longest = variable.batch_by_seqlens(LENGTHS, 10, **options)
    assert [ids for _, ids in found] == packs and [step for step, _ in found] == list(
        range(len(packs))
    )
    assert sizes == [len(pack) for pack in packs]
    assert longest == [max(LENGTHS[n] for n in pack) for pack in packs]


def test_steps_hold_whole_numbers_of_packs():
    packs, sizes, longest = variable.batch_by_seqlens(LENGTHS, 10, effective_batch_size=3)
    assert packs[:3] == [(0, [0, 1, 2]), (0, [3]), (0, [4, 5])] and len(packs) == 6
    assert (sizes, longest) == ([6, 6], [8, 9])
    packs, sizes, _ = variable.batch_by_seqlens(
        LENGTHS, 10, effective_batch_size=2, required_microbatches_of_same_size=True
    )
    assert [ids for _, ids in packs] == [
        [0], [1], [2, 4], [3, 5], [6], [7], [8], [9], [10, 12], [11, 14],
    ]  # fmt: skip
    assert sizes == [2, 4, 2, 2, 4]
    packs, _, _ = variable.batch_by_seqlens([4, 4, 4], 8, sequence_ids_per_mb=[10, 20, 30])
    assert packs == [(0, [10, 20]), (1, [30])]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(AssertionError, match="not enough datapoints"):
        variable.batch_by_seqlens([20, 30], 10)
    with pytest.raises(ValueError, match="sequence_picking_order"):
        variable.batch_by_seqlens(LENGTHS, 10, sequence_picking_order="longest")
    with pytest.raises(ValueError, match="no pack"):
        variable.batch_by_seqlens(LENGTHS, 10, min_batch_size=3, max_batch_size=2)
    with pytest.raises(ValueError, match="multiple of 4"):
        variable.get_dataloader_and_lr_scheduler_for_variable_batch_size(
            LENGTHS, LENGTHS, 10, 6, dataloader_batch_size=2, dataloader_num_replicas=2
        )
    with pytest.raises(ValueError, match="scaling method"):
        variable.scale_lr(1, 2, method="cubic")


@pytest.mark.parametrize(("method", "power"), [("linear", 1.0), ("sqrt", 0.5), ("none", 0.0)])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_learning_rates_follow_the_size_of_the_batch(method, power, decay):
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        base = decay and torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=decay)
        sizes = [2, 4, 8]
        made = variable.lr_scheduler_for_variable_batch_size(
            4, sizes, None, base or optimizer, method
        )
        return optimizer, made

    def rate(step):
        return 0.1 * (decay or 1) ** step * ([2, 4, 8][step % 3] / 4) ** power

    optimizer, scheduler = make()
    for step in range(7):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step))
        assert scheduler.get_lr() == [optimizer.param_groups[0]["lr"]]
        assert scheduler.get_last_lr() == pytest.approx([0.1 * (decay or 1) ** step])
        optimizer.step()
        scheduler.step()
    state = scheduler.state_dict()
    other, again = make()
    again.load_state_dict(state)
    other.step()
    again.step()
    assert other.param_groups[0]["lr"] == pytest.approx(rate(8))
    for step in (0, 2):
        again.step(step)
        assert other.param_groups[0]["lr"] == pytest.approx(rate(step))


def test_an_engine_measures_packs_and_scales(tmp_path):
    data = [torch.ones(length) for length in LENGTHS]
    model = torch.nn.Linear(1, 1)
    dynamic = {"enabled": True, "max_tokens": 10, "metrics_path": str(tmp_path)}
    sampling = {"dynamic_batching": dynamic, "num_workers": 0}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": 2,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "data_efficiency": {"enabled": True, "seed": 3, "data_sampling": sampling},
        },
    )
    make = variable.get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed
    options = {"dataset_filter_ids": [n for n in range(16) if LENGTHS[n] > 2]}
    with pytest.raises(ValueError, match="batch_seqlens_fn"):
        make(data, engine, **options)
    measure = {
        "dataloader_collate_fn": list,
        "batch_seqlens_fn": lambda b: torch.tensor([len(x) for x in b]),
    }
    make(data, engine, **measure)
    loader, engine.lr_scheduler, _ = make(data, engine, dataloader_collate_fn=list, **options)
    packs = [[0, 1], [3], [4], [6, 7], [8], [10, 11]]  # and [12, 14], which fills no step
    got, rates = [], []
    for batch in loader:
        got.append([len(sequence) for sequence in batch])
        rates.append(engine.get_lr()[0])
        engine.backward(engine(torch.ones(1, 1)).sum())
        engine.step()
    assert got == [[LENGTHS[n] for n in pack] for pack in packs]
    assert rates == pytest.approx([0.15, 0.15, 0.15, 0.15, 0.15, 0.15])
    with pytest.raises(ValueError, match="another dataset"):
        make(data[:5], engine)
