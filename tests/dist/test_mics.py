# SPDX-License-Identifier: Apache-2.0
"""MiCS on four gloo ranks: shards in groups of two, equal groups; against plain torch and against ordinary ZeRO-3."""

from __future__ import annotations

import json
import os
from collections import OrderedDict

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero.mics import MiCS_Init, MiCS_Optimizer
from deepspeed.runtime.zero.own_slice import piece_of
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

RANKS, STEPS = 4, 3


def config(zero, **extra):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        **extra,
    }


def net_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        OrderedDict(
            first=torch.nn.Linear(5, 7), act=torch.nn.Tanh(), last=torch.nn.Linear(7, 3, bias=False)
        )
    )


def x_of(rank, step):
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(net, rank, step):
    return net(x_of(rank, step)).square().sum()


def train(engine, rank, accumulate=1):
    norms = []
    for step in range(STEPS):
        for micro in range(accumulate):
            engine.backward(loss_of(engine, rank + 10 * micro, step))
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def whole(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [p.detach().clone() for p in engine.module.parameters()]


def by_hand(clip=0.0, accumulate=1):
    net = net_of().double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            for micro in range(accumulate):
                x = x_of(rank + 10 * micro, step).double()
                (net(x).square().sum() / RANKS / accumulate).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def agree(got, want):
    # Adam divides by the size of a gradient, so fp32 sums in another order show at 1e-6 of the learning rate.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


CELLS = {
    "plain": {},
    "clipped, accumulated, in pieces": {
        "gradient_clipping": 0.05,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"reduce_bucket_size": 20, "overlap_comm": True},
    },
    "states on the host": {
        "zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    },
    "two hops": {
        "zero_optimization": {"mics_shard_size": 4, "mics_hierarchical_params_gather": True}
    },
}


IN_FILES = {
    "zero_optimization": {
        "sub_group_size": 20,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "nvme"},
    }
}


def in_folder(extra, folder):
    zero = {
        key: {**value, "nvme_path": folder} if isinstance(value, dict) else value
        for key, value in extra["zero_optimization"].items()
    }
    return {**extra, "zero_optimization": zero}


def trains(rank, cells):
    left = {}
    for name, extra in cells.items():
        rest = dict(extra)
        zero = {"mics_shard_size": 2, **rest.pop("zero_optimization", {})}
        os.environ["LOCAL_SIZE"] = "2" if name == "two hops" else "4"  # processes of a machine
        try:
            engine = deepspeed.initialize(model=net_of(), config=config(zero, **rest))[0]
        finally:
            os.environ["LOCAL_SIZE"] = "4"
        hops = engine.mesh.state_axes[0].hops
        assert (hops is not None) == (name == "two hops")
        train(engine, rank, extra.get("gradient_accumulation_steps", 1))
        slices = [piece_of(p) for p in engine.module.parameters()]
        kind = isinstance(engine.optimizer, MiCS_Optimizer)
        left[name] = (whole(engine), slices, kind, engine.is_first_weights_partition_group())
        engine.destroy()
    return left


def test_training_is_that_of_the_plain_loop(ranks4, tmp_path):
    cells = {**CELLS, "in files": in_folder(IN_FILES, str(tmp_path))}
    results = ranks4.run(trains, cells)
    for name, extra in cells.items():
        want = by_hand(
            extra.get("gradient_clipping", 0.0), extra.get("gradient_accumulation_steps", 1)
        )
        for rank, result in enumerate(results):
            weights, slices, kind, first = result[name]
            agree(weights, want)
            assert slices == ([9, 2, 6] if name == "two hops" else [18, 4, 11]), name
            assert kind and first == (rank < 2 or name == "two hops"), name
            for a, b in zip(weights, results[0][name][0], strict=True):
                assert torch.equal(a, b), f"{name}: groups drift apart"


def exact(rank, zero):
    """Whole numbers and powers of two: every sum of gradients is exact, so its order cannot matter."""
    net = torch.nn.Linear(6, 5)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape) / 8)
    engine = deepspeed.initialize(model=net, config=config(zero))[0]
    for step in range(STEPS):
        x = (torch.arange(12.0).view(2, 6) * (rank + 1) + step) % 7
        engine.backward(engine(x).sum())
        engine.step()
    return whole(engine)


def exact_ones(rank):
    return exact(rank, {"mics_shard_size": 2}), exact(rank, {}), exact(rank, {"mics_shard_size": 4})


def test_where_sums_are_exact_it_is_zero_3_bit_for_bit(ranks4):
    for mics, zero3, all_ranks in ranks4.run(exact_ones):
        assert all(torch.equal(a, b) for a, b in zip(mics, zero3, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(all_ranks, zero3, strict=True))


def saves(rank, folder):
    engine = deepspeed.initialize(
        model=net_of(),
        config=config({"mics_shard_size": 2, "stage3_gather_16bit_weights_on_model_save": True}),
    )[0]
    train(engine, rank)
    engine.save_checkpoint(folder, tag="t")
    engine.save_16bit_model(folder, "whole.bin")
    saved = whole(engine)
    train(engine, rank)
    after = whole(engine)
    loaded = {}
    for name, zero in {"mics": {"mics_shard_size": 2}, "zero3": {}}.items():
        other = deepspeed.initialize(model=net_of(1), config=config(zero))[0]
        other.load_checkpoint(folder, tag="t")
        start = whole(other)
        train(other, rank)
        loaded[name] = (start, whole(other))
    return saved, after, loaded


def test_a_checkpoint_is_that_of_one_group(ranks4, tmp_path):
    results = ranks4.run(saves, str(tmp_path))
    names = sorted(p.name for p in (tmp_path / "t").glob("*.pt"))
    assert names == [
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_1_mp_rank_00_model_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]
    saved, after, _ = results[0]
    fp32 = list(get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="t").values())
    whole_file = list(torch.load(tmp_path / "whole.bin", weights_only=True).values())
    for mine, converted, written in zip(saved, fp32, whole_file, strict=True):
        assert torch.equal(mine, converted) and torch.equal(mine, written)
    for _, _, loaded in results:
        for name, (start, end) in loaded.items():
            for a, b, c, d in zip(start, saved, end, after, strict=True):
                assert torch.equal(a, b), name
                # ZeRO-3 over four ranks adds gradients up in another order
                torch.testing.assert_close(c, d, rtol=1e-5, atol=1e-5)
                assert name != "mics" or torch.equal(c, d)


def looks_and_edits(rank):
    cfg = config({"mics_shard_size": 2})
    with MiCS_Init(config_dict_or_path=cfg, dtype=torch.float32):
        torch.manual_seed(
            rank
        )  # each rank draws its own weights: the first rank's count, in both groups
        net = net_of(rank)
    drawn = [p.ds_axis.size for p in net.parameters()]
    engine = deepspeed.initialize(model=net, config=cfg)[0]
    start = whole(engine)
    weight = engine.module.first.weight
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0), torch.no_grad():
        weight.fill_(rank + 2.0)
    engine.backward(loss_of(engine, rank, 0))
    return (
        drawn,
        start,
        whole(engine)[0],
        safe_get_full_fp32_param(weight),
        safe_get_full_grad(weight),
    )


def test_one_ranks_weights_and_edits_reach_every_group(ranks4):
    want = net_of()
    for drawn, start, edited, master, grad in ranks4.run(looks_and_edits):
        assert drawn == [2, 2, 2]
        for a, b in zip(start, want.parameters(), strict=True):
            assert torch.equal(a, b)
        assert edited.unique().tolist() == [2.0] and master.unique().tolist() == [2.0]
        assert tuple(grad.shape) == (7, 5)
    with torch.no_grad():
        want.first.weight.fill_(2.0)
    for rank in range(RANKS):
        (loss_of(want, rank, 0) / RANKS).backward()
    torch.testing.assert_close(grad, want.first.weight.grad, rtol=1e-5, atol=1e-6)


def overflows(rank):
    half = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
    engine = deepspeed.initialize(model=net_of(), config=config({"mics_shard_size": 2}, **half))[0]
    before = whole(engine)
    loss = engine(x_of(rank, 0).half()).float().sum()
    engine.backward(
        loss * (float("inf") if rank == 3 else 1.0)
    )  # the second rank of the second group
    engine.step()
    kept = all(torch.equal(a, b) for a, b in zip(before, whole(engine), strict=True))
    engine.backward(engine(x_of(rank, 0).half()).float().sum())
    engine.step()
    went = not torch.equal(before[0], whole(engine)[0])
    return engine.skipped_steps, engine.optimizer.loss_scale, kept, went


def test_an_overflow_in_one_group_skips_the_step_in_all(ranks4):
    assert ranks4.run(overflows) == [(1, 8.0, True, True)] * RANKS


def refusals(rank):
    said = []
    for zero in (
        {"mics_shard_size": 3},
        {"mics_shard_size": 1},
        {"mics_shard_size": 2, "zero_hpz_partition_size": 2},
        {"zero_hpz_partition_size": 3},
    ):
        with pytest.raises(deepspeed.DeepSpeedConfigError) as caught:
            deepspeed.initialize(model=net_of(), config=config(zero))
        said.append(str(caught.value))
    return said


def test_sizes_that_cannot_be_are_named(ranks4):
    for said in ranks4.run(refusals):
        for text, part in zip(
            said,
            ["divisor of 4", "2 or more", "exclude each other", "zero_hpz_partition_size"],
            strict=True,
        ):
            assert part in text


def test_the_plan_counts_the_smaller_group():
    from deepspeed.runtime.memory_plan import plan_for, read_config
    from deepspeed.runtime.zero.estimate import ModelSize

    size = ModelSize((1_000_000,), largest_layer=1_000_000)
    zero3, mics = (
        plan_for(read_config(json.loads(json.dumps(config(zero)))), size, 4)
        for zero in ({}, {"mics_shard_size": 2})
    )
    assert mics.lasting("device") == 2 * zero3.lasting("device")
