# SPDX-License-Identifier: Apache-2.0
"""Configuration errors that keep the built-in type which callers already catch.

Each is a ``DeepSpeedConfigError`` and also the assertion, value, type or key error that the same mistake has always
raised, so ``except AssertionError`` in existing programs goes on working.
"""

from __future__ import annotations

from ..utils.errors import DeepSpeedConfigError


class ConfigAssertionError(DeepSpeedConfigError, AssertionError):
    """Values that are each legal contradict one another, as an impossible batch triad does."""


class ConfigValueError(DeepSpeedConfigError, ValueError):
    """A value, a file or a text is not one of the accepted forms."""


class ConfigTypeError(DeepSpeedConfigError, TypeError):
    """A value has the wrong type, or is an ``"auto"`` that nobody filled in."""


class ConfigKeyError(DeepSpeedConfigError, KeyError):
    """A section lacks a key that it needs."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put the sentence in quotes.
        return Exception.__str__(self)


__all__ = [
    "ConfigAssertionError",
    "ConfigKeyError",
    "ConfigTypeError",
    "ConfigValueError",
    "DeepSpeedConfigError",
]
