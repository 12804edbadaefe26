# SPDX-License-Identifier: Apache-2.0
"""Several gloo ranks: every cell of the grid against the plain torch loop that averages by hand."""

from __future__ import annotations

import os

import pytest

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
