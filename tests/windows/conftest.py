# SPDX-License-Identifier: Apache-2.0
"""One installation for all tests of this folder; without a Windows Python they are skipped, and say so."""

from __future__ import annotations

import pytest

from tests.windows import winpy


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> winpy.WindowsPython:
    if not winpy.available():
        pytest.skip(f"no Windows Python: not on Windows, and nothing under {winpy.HOME}")
    folder = tmp_path_factory.mktemp("installed") / winpy.FOLDER_NAME
    folder.mkdir()
    return winpy.install(folder)


@pytest.fixture(scope="session")
def oldest(windows: winpy.WindowsPython) -> winpy.WindowsPython:
    if winpy.NATIVE or not (winpy.OLDEST / ".complete").exists():
        pytest.skip(f"no second Windows Python with torch 2.3 under {winpy.OLDEST}")
    return windows.oldest()


@pytest.fixture
def folder(tmp_path):
    """A working folder whose name has a space and letters outside ASCII."""
    path = tmp_path / winpy.FOLDER_NAME
    path.mkdir()
    return path
