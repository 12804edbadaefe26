# SPDX-License-Identifier: Apache-2.0
"""The states of a process's random number generators, as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..accelerator import get_accelerator

_TORCH, _PYTHON, _NUMPY = "torch", "python", "numpy"


def capture() -> dict[str, Any]:
    """The present states: of torch, of its device, of Python's `random`, and of numpy where it is in use."""
    accelerator = get_accelerator()
    states: dict[str, Any] = {_TORCH: torch.get_rng_state(), _PYTHON: random.getstate()}
    if accelerator.device_name() != "cpu":
        states[accelerator.device_name()] = accelerator.get_rng_state()
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        states[_NUMPY] = (str(kind), [int(key) for key in keys], *map(float, rest))
    return states


def restore(states: Mapping[str, Any]) -> None:
    """Set what `capture` returned; generators that were not captured stay as they are."""
    accelerator = get_accelerator()
    torch.set_rng_state(states[_TORCH].clone())
    version, numbers, gauss = states[_PYTHON]
    random.setstate((version, tuple(numbers), gauss))
    device = accelerator.device_name()
    if device in states and device != "cpu":
        accelerator.set_rng_state(states[device].clone())
    if _NUMPY in states:
        import numpy

        kind, keys, position, has_gauss, gauss = states[_NUMPY]
        keys = numpy.array(keys, dtype=numpy.uint32)
        numpy.random.set_state((kind, keys, int(position), int(has_gauss), gauss))
