# SPDX-License-Identifier: Apache-2.0
"""The communication logger over two ranks: the engine's own collectives, their sizes, and who waits for whom."""

from __future__ import annotations

import time

import pytest
import torch

import deepspeed
import deepspeed.comm as dist

WIDTH = 64


def train(rank, stage, recording):
    """Two steps at ``stage``; the summary, and the loss and weights to compare with a run without the logger."""
    dist.reset_log()
    torch.manual_seed(0)
    model = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "comms_logger": {"enabled": recording},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    dist.reset_log()  # without what setting up took
    for step in range(2):
        inputs = torch.full((2, WIDTH), 0.1 * (rank + step + 1))
        engine.backward(engine(inputs).square().mean())
        engine.step()
    names = dist.get_logged_comm_ops()
    result = dist.log_summary(show_straggler=True, return_dict=True)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = engine.module.weight.detach().clone()
    dist.configure(enabled=False)
    dist.reset_log()
    engine.destroy()
    return names, result, weights


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engines_collectives_are_recorded_with_their_sizes(ranks2, stage):
    (names, result, weights), (_, other, _) = ranks2.run(train, stage, True)
    whole = WIDTH * WIDTH * 4
    summary = result["summary"]
    assert {"all_gather_into_tensor", "reduce_scatter_tensor"} <= set(names)
    scattered = summary["reduce_scatter_tensor"][whole]
    assert scattered["count"] == 2  # once a step, all gradients in one bucket
    assert scattered["total_latency_ms"] > 0
    gathered = summary["all_gather_into_tensor"]
    assert gathered[whole]["count"] >= 2  # the weights, once a step or more
    assert result["metadata"]["world_size"] == 2
    mine, theirs = result["straggler_analysis"], other["straggler_analysis"]
    for name, sizes in mine.items():
        for size, waits in sizes.items():
            again = theirs[name][size]
            assert waits["straggler_rank"] == again["straggler_rank"]
            assert min(waits["total_straggler_ms"], again["total_straggler_ms"]) == 0
    (silent, nothing, same), _ = ranks2.run(train, stage, False)
    assert (silent, nothing["summary"]) == ([], {})
    assert torch.equal(weights, same)


def late(rank):
    dist.configure(enabled=True, prof_all=False, prof_ops=["all_reduce"])
    dist.reset_log()
    for _ in range(3):
        if rank == 1:
            time.sleep(0.2)
        dist.all_reduce(torch.ones(8))
    if rank == 0:  # an operation that the other rank has none of
        dist.configure(prof_ops=["all_reduce", "broadcast"])
    dist.broadcast(torch.ones(8), 0)
    result = dist.log_summary(show_straggler=True, return_dict=True)
    dist.configure(enabled=False, prof_all=True, prof_ops=[])
    dist.reset_log()
    return result["straggler_analysis"]


def test_the_rank_that_the_others_wait_for_is_named(ranks2, capfd):
    first, second = (analysis["all_reduce"][32] for analysis in ranks2.run(late))
    assert (first["straggler_rank"], second["straggler_rank"]) == (1, 1)
    assert (first["count"], second["total_straggler_ms"]) == (3, 0)
    # three times 0.2 s of waiting, less what starting apart took away
    assert first["total_straggler_ms"] > 300
