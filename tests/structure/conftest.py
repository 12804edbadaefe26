# SPDX-License-Identifier: Apache-2.0
"""Prints the size table after the structure tests, so that each run of CI shows where lines went."""

from __future__ import annotations

import os

import pytest

from tests.structure import test_budget


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI"):
        terminalreporter.section("lines, planned (cap +20 %)")
        for row, planned in test_budget.BUDGET.items():
            terminalreporter.write_line(f"{test_budget.lines_below(row):6d} of {planned:5d}  {row}")
