# SPDX-License-Identifier: Apache-2.0
"""The ranks of the session: processes that stay alive from test to test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import fake_cuda
from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks3() -> Iterator[RankPool]:
    with RankPool(3) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def gpu1() -> Iterator[RankPool]:
    """A rank with a fake CUDA device; of one module, because what a device saw stays with it."""
    with RankPool(1) as pool:
        assert pool.run(fake_cuda.on_rank, timeout=120) == ["cuda"]
        yield pool


@pytest.fixture(scope="module")
def gpus2() -> Iterator[RankPool]:
    """Two ranks, each with a fake CUDA device."""
    with RankPool(2) as pool:
        assert pool.run(fake_cuda.on_rank, timeout=120) == ["cuda"] * 2
        yield pool
