# SPDX-License-Identifier: Apache-2.0
"""The name of a backend for Intel's collective library, which this package does not drive."""

from __future__ import annotations

from typing import Any

from deepspeed.utils.errors import DeepSpeedCommError, explain

from .torch import TorchBackend


class CCLBackend(TorchBackend):
    """Raises when made: gloo serves CPUs here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise DeepSpeedCommError(
            explain("the ccl backend is not supported", expected="gloo or nccl", fix="Use gloo.")
        )
