# SPDX-License-Identifier: Apache-2.0
"""Command lines that end in a script and its own arguments, which are taken exactly as they come."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspeed.utils.errors import explain


class ScriptParser(argparse.ArgumentParser):
    """A parser for ``[flags] SCRIPT [ARGS...]`` that never looks at ARGS.

    argparse's REMAINDER does look: it drops a ``--`` after the script and complains of a script's flag
    that could abbreviate two of ours. Here the line is cut at the script before argparse sees it.

    Args:
        script: name of the attribute that gets the script.
        rest: name of the attribute that gets its arguments.
    """

    def __init__(self, script: str, rest: str, **kwargs: Any) -> None:
        self._script, self._rest = script, rest
        self._with_value: dict[str, bool] = {}
        super().__init__(**kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Like argparse's; flags with one value or none only."""
        action = super().add_argument(*names, **kwargs)
        for name in action.option_strings:
            self._with_value[name] = action.nargs != 0
        return action

    def _takes_next(self, word: str) -> bool:
        """Say whether the word after this flag is the flag's value."""
        if word.startswith("--"):
            matches = [name for name in self._with_value if name.startswith(word)]
            exact = [word] if word in self._with_value else matches
            return len(exact) == 1 and self._with_value[exact[0]]
        return len(word) == 2 and self._with_value.get(word, False)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; ends the program with status 2 on a wrong flag or when there is no script."""
        words = list(sys.argv[1:] if args is None else args)
        at = 0
        while at < len(words) and words[at].startswith("-") and words[at] != "--":
            at += 2 if self._takes_next(words[at]) else 1
        parsed = super().parse_args(words[:at], namespace)
        tail = words[at:]
        if tail[:1] == ["--"]:
            tail = tail[1:]
        if not tail:
            self.error(f"the following arguments are required: {self._script}")
        parsed.launcher_words = words[:at]
        setattr(parsed, self._script, tail[0])
        setattr(parsed, self._rest, tail[1:])
        return parsed


def check_program(script: str, *, module: bool, no_python: bool) -> None:
    """Check that what the ranks are to run is there, before any of them starts.

    Raises:
        ValueError: ``module`` and ``no_python`` exclude each other.
        FileNotFoundError: there is no such script, module or program.
    """
    if module and no_python:
        raise ValueError(
            explain(
                "--no_python and --module exclude each other",
                got="both",
                fix="A module runs under Python: drop --no_python.",
            )
        )
    found: object
    if module:
        root = script.partition(".")[0]
        # an editable install has a finder of its own, which the second question reaches
        found = importlib.machinery.PathFinder.find_spec(root, [os.getcwd(), *sys.path])
        found = found or importlib.util.find_spec(root)
        kind, fix = "module", "Check its name, the current directory and PYTHONPATH."
    elif no_python:
        found = shutil.which(script) or Path(script).is_file()
        kind, fix = "program", "Check its path, or its folder in PATH."
    else:
        found = Path(script).exists()
        kind, fix = "script", "Check the path; launcher flags go before the script."
    if not found:
        raise FileNotFoundError(
            explain(f"there is no {kind} {script!r}", got=f"directory {os.getcwd()}", fix=fix)
        )
