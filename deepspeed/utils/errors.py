# SPDX-License-Identifier: Apache-2.0
"""One form for every message to the user: what went wrong, what we got, what we expected, how to fix it."""

from __future__ import annotations


class DeepSpeedError(Exception):
    """Base of the errors that DeepSpeed raises for a user's mistake or an unusable machine."""


class DeepSpeedConfigError(DeepSpeedError):
    """The configuration asks for something wrong, contradictory or not built yet."""


class DeepSpeedCommError(DeepSpeedError, RuntimeError):
    """Processes could not be joined, or a collective was called in a way that cannot work."""


class DeepSpeedCheckpointError(DeepSpeedError):
    """A checkpoint is missing, damaged, or does not fit the model that loads it."""


def explain(
    what: str,
    *,
    got: object = None,
    expected: object = None,
    fix: str | None = None,
) -> str:
    """Build an error message in the one form used everywhere.

    Args:
        what: the fact, as a sentence without its final full stop.
        got: the offending value; strings are shown as they are, other values by ``repr``.
        expected: what would have been accepted, in the same way.
        fix: what the user should do, as a sentence.

    Returns:
        The message. Parts that are None are left out.

    Example:
        >>> explain("unknown optimizer", got="Adm", expected="Adam or AdamW", fix="Correct 'type'.")
        "unknown optimizer: got Adm, expected Adam or AdamW. Correct 'type'."
    """
    facts = [
        f"{label} {value if isinstance(value, str) else repr(value)}"
        for label, value in (("got", got), ("expected", expected))
        if value is not None
    ]
    head = what.rstrip(".")
    if facts:
        head = f"{head}: {', '.join(facts)}"
    if not head.endswith((".", "!", "?")):
        head += "."
    return f"{head} {fix}" if fix else head
