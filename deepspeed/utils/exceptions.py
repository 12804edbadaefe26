# SPDX-License-Identifier: Apache-2.0
"""Exceptions that have no better home."""


class DeprecatedException(Exception):
    """The function is no longer there for use."""
