# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: a fixed seed, no CUDA test without a device, and nothing left behind in the process."""

from __future__ import annotations

import contextlib
import logging
import os
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


def joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def process_as_it_was() -> Iterator[None]:
    """Undo what an engine leaves in its process: the default group, the mesh, variables, the logger's level."""
    had_group, variables = joined(), dict(os.environ)
    logger = logging.getLogger("DeepSpeed")
    level, threads = logger.level, torch.get_num_threads()
    yield
    if joined() and not had_group:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        groups.reset()
        comm.is_initialized()  # takes over a group that the test made through torch
        comm.destroy_process_group()
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
    if level != logging.NOTSET:  # the package may have been imported by the test
        logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _module_leaves_nothing() -> Iterator[None]:
    import deepspeed.utils.logging  # noqa: F401  (its level is set at import)

    with process_as_it_was():
        yield


@pytest.fixture(autouse=True)
def _test_leaves_nothing() -> Iterator[None]:
    torch.manual_seed(1234)
    with process_as_it_was():
        yield
