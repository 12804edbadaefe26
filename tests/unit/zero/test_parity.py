# SPDX-License-Identifier: Apache-2.0
"""One process: every cell of the grid against the plain torch loop."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops.registry import use_isa
from tests.helpers.parity import Cell, compare, engine_run, grid, plain_run


@pytest.fixture
def one_thread(monkeypatch):
    # Two threads would cut matrix products differently for the two runs.
    torch.set_num_threads(1)
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "0")


@pytest.fixture
def reference_rule(one_thread):
    use_isa("reference")
    yield
    use_isa("auto")


@pytest.mark.parametrize("cell", grid(), ids=str)
def test_with_the_reference_rule_every_bit_is_that_of_the_plain_loop(cell, reference_rule):
    compare(engine_run(cell), plain_run(cell), cell, exact=True)


@pytest.mark.parametrize("cell", grid(), ids=str)
def test_with_the_native_rule_runs_agree_within_ulps(cell, one_thread):
    compare(engine_run(cell), plain_run(cell), cell, exact=False)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_part_of_the_states_on_the_host_changes_nothing(ratio, reference_rule):
    whole = Cell(2, "bf16", accumulate=3, clip=True)
    part = Cell(
        2,
        "bf16",
        accumulate=3,
        clip=True,
        extra={
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu", "ratio": ratio},
            }
        },
    )
    compare(engine_run(part), engine_run(whole), part, exact=True)
