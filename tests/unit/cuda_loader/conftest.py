# SPDX-License-Identifier: Apache-2.0
"""A fresh fake driver for each test, and kernels that run through it on CPU tensors."""

from __future__ import annotations

import pytest

from deepspeed.ops import cuda
from deepspeed.utils import env

from . import fake as fakes
from . import packs


@pytest.fixture(scope="session")
def fake_library():
    if fakes.compiler() is None:
        pytest.skip("the fake CUDA driver is compiled by g++, which is not here")
    return fakes.build()


@pytest.fixture
def fake(fake_library, tmp_path, monkeypatch):
    monkeypatch.setenv(env.DS_KERNEL_CACHE.name, str(tmp_path / "cache"))
    made = fakes.Fake(fake_library, packs.make(tmp_path, {"sm_80": b"sm_80 cubin"}))
    yield made
    made.dll.fake_reset()


@pytest.fixture
def kernels(fake):
    """Kernels serve every CPU tensor of the test, as if it lay on device 0."""
    before = cuda.use(fake.loader())
    yield fake
    cuda.use(before)
