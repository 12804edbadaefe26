# SPDX-License-Identifier: Apache-2.0
"""ZenFlow on one rank: against a plain float64 loop, and against plain offloading where the two are one."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.zenflow import Loop, engine, seen, train, weights

SLOW = {"topk_ratio": 0.3, "update_interval": 3, "select_strategy": "step", "select_interval": 6}


def check(got, want):
    # fp32 against float64 over a dozen steps of a tenth of the weights' size
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("stage", "section", "loop"),
    [
        (1, SLOW, Loop(choose=6)),
        (2, {**SLOW, "overlap_step": True}, Loop(choose=6, overlap=True)),
        (3, {**SLOW, "offload": True, "full_warm_up_rounds": 2}, Loop(choose=6, warm_up=2)),
        (3, {**SLOW, "topk_ratio": 0.0, "overlap_step": True}, Loop(0.0, choose=6, overlap=True)),
    ],
)
def test_columns_and_the_rest_step_as_in_a_plain_loop(stage, section, loop):
    made = engine(stage, {"zenflow": section})
    train(made)
    want = loop.run()
    check(weights(made), want)
    check(seen(made), {name: p.detach() for name, p in zip(want, loop.shown, strict=True)})
    made.destroy()
