# SPDX-License-Identifier: Apache-2.0
"""Libraries that drive the engine; their tests run where they are installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.libraries import forget
from tests.helpers.ranks import RankPool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _no_network_and_no_memory_of_the_last_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    forget()
