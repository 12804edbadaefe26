# SPDX-License-Identifier: Apache-2.0
"""ZenFlow and SuperOffload on two ranks, and their checkpoints."""

from __future__ import annotations

import torch

from tests.helpers.zenflow import Loop, engine, seen, train, weights

SLOW = {"topk_ratio": 0.3, "update_interval": 3, "select_strategy": "step", "select_interval": 6}
RUNS = (
    (1, SLOW, Loop(choose=6, ranks=2)),
    (2, {**SLOW, "overlap_step": True}, Loop(choose=6, ranks=2, overlap=True)),
    (3, {**SLOW, "overlap_step": True}, Loop(choose=6, ranks=2, overlap=True)),
)


def close(got, want):
    for name, value in want.items():
        # fp32 against float64 over a dozen steps of a tenth of the weights' size
        torch.testing.assert_close(got[name].double(), value.detach(), rtol=2e-4, atol=2e-5)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def columns_over_ranks(rank, runs):
    for stage, section, loop in runs:
        made = engine(stage, {"zenflow": section})
        train(made, rank)
        want = loop.run()
        close(weights(made), want)
        close(seen(made), dict(zip(want, loop.shown, strict=True)))
        made.destroy()


def test_columns_are_chosen_over_all_ranks(ranks2):
    ranks2.run(columns_over_ranks, RUNS)


def saves_and_goes_on(rank, folder, stage, section, auto):
    """Save in the middle of an interval (and of the host's step), go on; and go on from what was saved."""
    zero = {"zenflow": {**section, "overlap_step": not auto}}
    more = {"bf16": {"enabled": True}, "gradient_clipping": 0.7}
    first = engine(stage, zero, **more)
    train(first, rank, last=5)
    counts = vars(first.optimizer.order.counts).copy()
    first.save_checkpoint(folder, tag=f"tag{stage}")
    assert (first.optimizer.order._pending is None) and (auto or counts["waiting"])
    losses = train(first, rank, first=5)
    second = engine(stage, zero, seed=1, **more)
    second.load_checkpoint(folder, tag=f"tag{stage}")
    assert vars(second.optimizer.order.counts) == counts
    assert train(second, rank, first=5) == losses
    assert same(weights(first), weights(second)) and same(seen(first), seen(second))
    first.destroy()
    second.destroy()
    return losses


def stages_save(rank, folder):
    for stage in (1, 3):
        saves_and_goes_on(rank, folder, stage, SLOW, auto=False)
    saves_and_goes_on(rank, folder, 2, {"topk_ratio": 0.3}, auto=True)


def loads_elsewhere(rank, folder, losses=None):
    """What two ranks saved goes on with one, and without ZenFlow."""
    zenflow = {**SLOW, "overlap_step": True}
    more = {"bf16": {"enabled": True}, "gradient_clipping": 0.7}
    for zero in ({"zenflow": zenflow}, {}):
        made = engine(2 if zero else 1, zero, seed=2, **more)
        made.load_checkpoint(folder, tag="tag1")
        if zero:
            order = made.optimizer.order
            assert order.counts.waiting == 2 and order.splits[0].columns.numel
            assert order.splits[0].rest.any()
        states = [set(state) for state in made.optimizer.state.values()]
        assert all(keys == {"step", "exp_avg", "exp_avg_sq"} for keys in states)
        train(made, first=5)
        made.destroy()


def test_a_run_goes_on_from_the_middle_of_an_interval(ranks2, tmp_path):
    ranks2.run(stages_save, str(tmp_path))
    loads_elsewhere(0, str(tmp_path))


def trials_over_ranks(rank, cases):
    for more in cases:
        found = []
        for super_offload in (False, True):
            offload = {"device": "cpu", "super_offload": super_offload}
            zero = {"offload_optimizer": offload, "sub_group_size": 8, "reduce_bucket_size": 20}
            made = engine(3, zero, **more)
            losses = train(made, rank)
            found.append((losses, made.skipped_steps, weights(made), seen(made)))
            order = made.optimizer.order
            made.destroy()
        assert found[0][:2] == found[1][:2]
        assert same(found[0][2], found[1][2]) and same(found[0][3], found[1][3])
        assert 0 < order.agreed < order.tried or not more


def test_steps_on_trial_give_the_bits_of_plain_ones(ranks2):
    fp16 = {"enabled": True, "initial_scale_power": 15, "loss_scale_window": 2, "hysteresis": 1}
    clipped = {"bf16": {"enabled": True}, "gradient_clipping": 0.75}
    ranks2.run(trials_over_ranks, [{}, clipped, {"fp16": fp16, "gradient_accumulation_steps": 2}])
