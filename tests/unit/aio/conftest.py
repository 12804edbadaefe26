# SPDX-License-Identifier: Apache-2.0
"""Each backend of this machine in turn, and a folder whose name needs care."""

from __future__ import annotations

import pytest

from deepspeed.ops.aio import FileQueue, Options, backends


@pytest.fixture(params=backends())
def backend(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "Mötley Crüe 文件"
    path.mkdir()
    return path


@pytest.fixture
def queue(backend):
    with FileQueue(Options(block_size=4096, queue_depth=4), backend) as made:
        yield made
