# SPDX-License-Identifier: Apache-2.0
"""The memory plan against what the optimizer really allocates, and the older estimates against recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero import estimate
from deepspeed.runtime.zero.estimate import MemoryPlan, ModelSize, Row, Run, Widths, memory_plan
from deepspeed.runtime.zero.plan import Plan, TierKind

RECORDED = json.loads(Path(__file__).with_name("estimates.json").read_text(encoding="utf-8"))


def tensor_bytes(tensors):
    """Bytes behind tensors, memory that several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held_by(engine):
    """What model and optimizer hold, looked up tensor by tensor."""
    found = [p.data for p in engine.module.parameters()]
    found += [p.grad for p in engine.module.parameters() if p.grad is not None]
    optimizer = engine.optimizer
    for group in optimizer.param_groups:
        for param in group["params"]:
            found.append(param.data)
            found += [v for v in optimizer.state[param].values() if torch.is_tensor(v) and v.dim()]
    for shard_group in getattr(optimizer, "groups", ()):
        found += [part.held_grad for part in shard_group.parts if part.held_grad is not None]
    return tensor_bytes(found)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offload", [False, True])
def test_plan_counts_what_a_step_leaves_allocated(stage, dtype, offload):
    from deepspeed.runtime.memory_plan import plan_for

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(61, 40), torch.nn.Linear(40, 13))
    net[0].bias.requires_grad_(False)
    zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True, **({"loss_scale": 1} if dtype == "fp16" else {})}
    engine, *_ = deepspeed.initialize(model=net, config=config)
    x = torch.randn(1, 61, dtype=next(net.parameters()).dtype)
    engine.backward(engine(x).float().square().sum())
    engine.step()
    if stage == 0 and dtype == "fp32":  # the only case in which zero_grad gives memory back
        for param in net.parameters():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
    plan = plan_for(engine._config, ModelSize.of_module(net), 1, device_is_host=True)
    # Alignment of the flat buffers is all that may differ: 2 elements of each kind.
    assert abs(plan.lasting("host") - held_by(engine)) <= 2 * 4 * 5, str(plan)
    engine.destroy()


@pytest.mark.parametrize(
    ("stage", "param", "grad", "states"),
    [(0, 1, 1, 1), (1, 1, 0, 1 / 4), (2, 1, 1 / 4, 1 / 4), (3, 1 / 4, 1 / 4, 1 / 4)],
)
def test_lasting_bytes_follow_the_formulas_of_zero(stage, param, grad, states):
    numel = 1 << 20
    size = ModelSize((numel // 2, numel // 2), largest_layer=numel // 2)
    widths = Widths(param=2, grad=2, reduce=2)
    plan = memory_plan(size, Plan.for_stage(stage), widths, Run(world=4))
    # Rajbhandari et al. 2020, section 3: 2 + 2 + 12 bytes a parameter, each divided where the stage shards it.
    assert plan.lasting("device") == numel * (2 * param + 2 * grad + 12 * states)


def test_offload_moves_states_by_its_share():
    size = ModelSize((1000,), largest_layer=1000)
    plan = memory_plan(size, Plan.for_stage(1).on_host(0.25), Widths(param=2), Run())
    moved = {row.role: row.nbytes for row in plan.rows if row.tier == "host"}
    assert moved == {"master weights": 1000, "optimizer states": 2000, "gradients": 1000}
    assert plan.lasting("device") == 2000 + 750 * 16


def test_files_hold_states_and_memory_only_what_is_staged():
    from dataclasses import replace

    size = ModelSize((1000, 3000), largest_layer=3000)
    on_disk = replace(
        Plan.for_stage(3), state_tier=TierKind.FILE, param_tier=TierKind.HOST, part_numel=100
    )
    plan = memory_plan(size, on_disk, Widths(param=2, grad=2), Run(world=2))
    by_tier = {(row.role, row.tier): row.nbytes for row in plan.rows}
    assert by_tier["master weights", "file"] == 2000 * 4
    assert by_tier["optimizer states", "file"] == 2000 * 8
    assert by_tier["buffers of states", "host"] == 3 * 100 * 12
    assert by_tier["params", "host"] == by_tier["gradients", "file"] == 2000 * 2
    assert by_tier["buffers of gradients", "host"] == 2 * 100 * 2
    assert by_tier["gathered params", "device"] == 4000 * 2


def test_frozen_params_have_neither_gradients_nor_states():
    frozen = memory_plan(ModelSize((10,), (990,), 990), Plan.for_stage(0), Widths(), Run())
    assert frozen.lasting("device") == 990 * 4 + 10 * 4 * (1 + 1 + 2)  # masters are the params


def test_accumulation_keeps_whole_gradients_at_stage_1_only():
    size = ModelSize((1000,), largest_layer=1000)

    def unreduced(stage, micro_batches):
        plan = memory_plan(
            size, Plan.for_stage(stage), Widths(), Run(world=2, accumulation=micro_batches)
        )
        return sum(row.nbytes for row in plan.rows if row.role == "unreduced gradients")

    assert [unreduced(1, 1), unreduced(1, 2), unreduced(2, 2)] == [0, 4000, 0]


def test_shared_and_sharded_params_count_once_and_whole():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert ModelSize.of_module(net) == ModelSize((16,), largest_layer=16)
    net[0].weight.ds_numel = 64
    assert ModelSize.of_module(net) == ModelSize((64,), largest_layer=64)


# - refusal

PLAN = MemoryPlan("a run", (Row("params", "device", 3 << 30), Row("states", "host", 1 << 20)))


def test_what_fits_passes_and_unknown_tiers_are_not_checked():
    estimate.check_fits(PLAN, {"device": 3 << 30})
    estimate.check_fits(PLAN, {})


def test_what_does_not_fit_is_refused_with_the_table():
    with pytest.raises(MemoryError, match="does not fit") as caught:
        estimate.check_fits(PLAN, {"device": 1 << 30, "host": 1 << 30})
    text = str(caught.value)
    assert "3.00 GB of device memory" in text and "at most 1.00 GB of device memory" in text
    assert "offload" in text and str(PLAN) in text


def test_table_has_a_row_for_each_role_and_a_column_for_each_tier():
    lines = str(PLAN).splitlines()
    assert lines[0] == "a run"
    assert lines[1].split() == ["each", "rank", "keeps", "device", "host"]
    assert lines[2].split() == ["params", "3.00", "GB", "-"]
    assert lines[-1].split() == ["at", "most", "3.00", "GB", "1.00", "MB"]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KB"), (3 << 42, "12288.00 GB")]
)
def test_sizes_are_told_for_people(nbytes, text):
    assert estimate.size_text(nbytes) == text


# - the older estimates


@pytest.mark.parametrize(("stage", "args", "wanted"), RECORDED)
def test_older_estimates_give_the_recorded_bytes(stage, args, wanted):
    got = getattr(estimate, f"estimate_zero{stage}_model_states_mem_needs")(*args)
    assert list(got) == wanted


def test_stage_2_table(capsys):
    estimate.estimate_zero2_model_states_mem_needs_all_cold(int(3e9), 8, 2)
    assert capsys.readouterr().out.splitlines() == [
        "Estimated memory needed for params, optim states and gradients for a:",
        "HW: Setup with 2 nodes, 8 GPUs per node.",
        "SW: Model with 3000M total params.",
        "  per CPU  |  per GPU |   Options",
        "  268.22GB |   5.59GB | offload_optimizer=cpu ",
        "  134.11GB |   8.73GB | offload_optimizer=none",
    ]


def test_stage_3_table_of_a_module(capsys):
    net = torch.nn.Sequential(torch.nn.Linear(5000, 20000, device="meta"))
    net.append(torch.nn.Linear(20000, 50, device="meta"))
    net.append(net[0])
    estimate.estimate_zero3_model_states_mem_needs_all_live(net)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "HW: Setup with 1 node, 1 GPU per node.",
        "SW: Model with 101M total params, 100M largest layer params.",
    ]
    assert lines[4].startswith("    2.54GB |   0.37GB | offload_param=cpu ")
    assert lines[6].startswith("    2.26GB |   0.56GB | offload_param=none, offload_optimizer=cpu ")
    assert (
        lines[9]
        == "    0.56GB |   2.07GB | offload_param=none, offload_optimizer=none, zero_init=0"
    )
    estimate.estimate_zero2_model_states_mem_needs_all_live(net)
    assert "101M total params." in capsys.readouterr().out
