# SPDX-License-Identifier: Apache-2.0
"""Helpers of ZenFlow under the names that callers know."""

from ..zero.host_worker import split_cores as _split_affinity

__all__ = ["_split_affinity"]
