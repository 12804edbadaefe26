# SPDX-License-Identifier: Apache-2.0
"""What the configuration tests share: the texts that the package logs."""

from __future__ import annotations

import logging

import pytest


class _Texts(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def logged():
    """Messages that the package's logger lets through, in order."""
    logger = logging.getLogger("DeepSpeed")
    handler = _Texts()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)
