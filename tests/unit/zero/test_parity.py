# SPDX-License-Identifier: Apache-2.0
"""One process: every cell of the grid against the plain torch loop."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.parity import Cell, compare, engine_run, grid, plain_run


@pytest.fixture
def one_thread():
    # Two threads would cut matrix products differently for the two runs.
    torch.set_num_threads(1)


@pytest.mark.parametrize("cell", grid(), ids=str)
def test_with_the_reference_rule_every_bit_is_that_of_the_plain_loop(cell, one_thread, monkeypatch):
    monkeypatch.setenv("DS_CPU_ISA", "reference")
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "0")
    compare(engine_run(cell), plain_run(cell), cell, exact=True)


@pytest.mark.parametrize("cell", grid(), ids=str)
def test_with_the_native_rule_runs_agree_within_ulps(cell, one_thread, monkeypatch):
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "0")
    compare(engine_run(cell), plain_run(cell), cell, exact=False)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_part_of_the_states_on_the_host_changes_nothing(ratio, one_thread, monkeypatch):
    monkeypatch.setenv("DS_CPU_ISA", "reference")
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
