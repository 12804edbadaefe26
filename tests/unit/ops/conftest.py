# SPDX-License-Identifier: Apache-2.0
"""Fixtures: each path of the native library, and a loader that forgets what it has loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepspeed.ops import native, registry


def paths() -> list[str]:
    """Names of the paths that can be forced here, the torch reference among them."""
    return [*native.status().available, "reference"]


_NONE = pytest.param("", marks=pytest.mark.skip(reason="there is no native library here"))


@pytest.fixture(params=native.status().available or [_NONE])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each native path that this machine and this library have."""
    registry.use_isa(request.param)
    yield request.param
    registry.use_isa("auto")


@pytest.fixture(params=paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each path: every native one, and the reference."""
    registry.use_isa(request.param)
    yield request.param
    registry.use_isa("auto")


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the loaded library and every op's route, before the test and after it."""
    monkeypatch.setattr(native, "_cached", None)
    for op in registry.ops().values():
        op.forget()
    yield
    for op in registry.ops().values():
        op.forget()
