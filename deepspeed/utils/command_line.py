# SPDX-License-Identifier: Apache-2.0
"""A command's words as one line for this system's shell: for people, logs and files; nothing here is run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence


def as_typed(words: Sequence[str]) -> str:
    """Return a command as the user could type it.

    Args:
        words: the program and its arguments.
    """
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
