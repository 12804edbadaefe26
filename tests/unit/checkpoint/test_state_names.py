# SPDX-License-Identifier: Apache-2.0
"""A state of one meaning is found whatever the optimizer that saved it called it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from tests.helpers.checkpointing import SAVE_AT, STEPS, Net, config, train


@pytest.mark.parametrize(
    ("before", "after"), [((2, "cpu"), (2, "none")), ((0, "none"), (1, "cpu"))]
)
def test_the_sums_of_adagrad_are_found_by_the_class_of_another_tier(
    before: tuple[int, str], after: tuple[int, str], tmp_path: Path
) -> None:
    """torch's class calls them otherwise than the one for the host's memory."""

    def make(where: tuple[int, str], seed: int) -> Any:
        torch.manual_seed(seed)
        net = Net()
        made = config(where[0], "bf16", {"offload_optimizer": {"device": where[1]}})
        made["optimizer"] = {"type": "Adagrad", "params": {"lr": 1e-2}}
        return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=made)[0]

    first = make(before, 0)
    train(first, 0, SAVE_AT)
    first.save_checkpoint(tmp_path)
    second = make(after, 9)
    second.load_checkpoint(tmp_path)
    assert type(second.basic_optimizer) is not type(first.basic_optimizer)
    assert train(second, SAVE_AT, STEPS) == train(first, SAVE_AT, STEPS)
