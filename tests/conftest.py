# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: a fixed seed, two threads at most, and no CUDA test where there is no device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(1234)
    yield
    torch.set_num_threads(threads)
