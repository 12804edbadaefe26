# SPDX-License-Identifier: Apache-2.0
"""Several gloo ranks: every cell of the grid against the plain torch loop that averages by hand."""

from __future__ import annotations

import os

import pytest
import torch

from deepspeed.ops.registry import use_isa
from tests.helpers.parity import Cell, Run, compare, engine_run, grid, plain_run


def both(rank: int, cell: Cell, ranks: int) -> tuple[Run, Run]:
    os.environ["DS_LOWP_PRODUCTS"] = "0"
    use_isa("reference")
    try:
        return engine_run(cell, rank, ranks), plain_run(cell, rank, ranks)
    finally:
        use_isa("auto")
        del os.environ["DS_LOWP_PRODUCTS"]


@pytest.mark.parametrize("cell", grid(), ids=str)
def test_two_ranks_agree_with_the_plain_loop(cell, ranks2):
    results = ranks2.run(both, cell, 2)
    for got, want in results:
        # With clipping, the norm is summed by shards here and by parameters there; the last bit of the factor may differ.
        compare(got, want, cell, exact=not cell.clip)
    for name, value in results[0][0].weights.items():
        assert value.equal(results[1][0].weights[name]), f"ranks differ in {name}"


@pytest.mark.parametrize(
    "extra",
    [
        {"overlap_comm": True, "reduce_bucket_size": 200},
        {"reduce_bucket_size": 1},
        {"round_robin_gradients": True, "reduce_bucket_size": 300},
    ],
    ids=["overlapped", "a-bucket-a-param", "round-robin"],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_and_order_change_nothing(stage, extra, ranks2):
    cell = Cell(stage, "fp32", accumulate=3, extra={"zero_optimization": {"stage": stage, **extra}})
    for got, want in ranks2.run(both, cell, 2):
        compare(got, want, cell, exact=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_ranks_agree_with_the_plain_loop(stage, dtype, accumulate, ranks3):
    cell = Cell(stage, dtype, accumulate=accumulate)
    for got, want in ranks3.run(both, cell, 3):
        # gloo's own fp32 all-reduce (stage 0) adds up around a ring, the plain loop in the order of the ranks.
        compare(got, want, cell, exact=stage > 0 or dtype != "fp32")


TIERS = ("device", "cpu", "nvme")


def stage3_cell(params: str, states: str, dtype: str, folder: str) -> Cell:
    """Stage 3 with its parameters and its states each on a tier; accumulating and clipping."""
    zero: dict[str, object] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "sub_group_size": 300,
        "reduce_bucket_size": 400,
    }
    for section, tier in (("offload_param", params), ("offload_optimizer", states)):
        if tier != "device":
            zero[section] = {"device": tier, "nvme_path": folder}
    extra = {"zero_optimization": zero}
    return Cell(3, dtype, accumulate=2, clip=True, extra=extra)


def walk_tiers(rank: int, ranks: int, dtype: str, folder: str) -> tuple[Run, dict[str, Run]]:
    """One plain run, and an engine's for every pair of tiers."""
    os.environ["DS_LOWP_PRODUCTS"] = "0"
    use_isa("reference")
    try:
        runs = {
            f"params on {params}, states on {states}": engine_run(
                stage3_cell(params, states, dtype, folder), rank, ranks
            )
            for params in TIERS
            for states in TIERS
        }
        return plain_run(stage3_cell("device", "device", dtype, folder), rank, ranks), runs
    finally:
        use_isa("auto")
        del os.environ["DS_LOWP_PRODUCTS"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stage_3_trains_alike_wherever_its_parts_live(ranks, dtype, request, tmp_path):
    if ranks == 1:
        torch.set_num_threads(1)
        results = [walk_tiers(0, 1, dtype, str(tmp_path))]
    else:
        pool = request.getfixturevalue(f"ranks{ranks}")
        results = pool.run(walk_tiers, ranks, dtype, str(tmp_path), timeout=120)
    cell = stage3_cell("device", "device", dtype, "")
    for want, runs in results:
        assert len(runs) == 9
        reference = runs["params on device, states on device"]
        compare(reference, want, cell, exact=False)
        for where, got in runs.items():
            assert got.losses == reference.losses, where
            for name, value in reference.weights.items():
                assert torch.equal(got.weights[name], value), f"{name}, {where}"
