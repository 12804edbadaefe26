# SPDX-License-Identifier: Apache-2.0
"""An optimizer in a process of its own: steps are ordered through a few bytes of shared memory, and waited for there.

These are the ``zenflow_adam_*`` functions of the op ``cpu_adam``. Our own ZenFlow needs no process: a thread does as well.
Two buffers of gradients take turns, so that one may be filled while the other is read; each has moments of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepspeed.ops.rules import adam_step
from deepspeed.utils.errors import explain

_MOST_GROUPS = 64
# Seconds between two looks at the shared bytes: short beside a step, long beside a switch of threads.
_NAP = 50e-6
_FIELDS = ("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction")


class _Control(ctypes.Structure):
    """The shared bytes. Each counter has one side that writes it, after what it stands for."""

    _fields_ = [
        ("ordered", ctypes.c_uint64),
        ("done", ctypes.c_uint64),
        ("noted", ctypes.c_uint64),
        ("ended", ctypes.c_uint64),
        ("groups", ctypes.c_int64),
        ("buffer", ctypes.c_int64),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_double * _MOST_GROUPS) for name in _FIELDS),
    ]


@dataclass
class _Worker:
    decoupled: bool
    cores: list[int]
    groups: list[tuple[Tensor, ...]] = field(default_factory=list)


_workers: dict[int, _Worker] = {}
_handles = itertools.count(1)


def create(decoupled: bool, affinity: Sequence[int]) -> int:
    """Make a worker that runs on the given cores, where the system lets it; returns its handle."""
    handle = next(_handles)
    _workers[handle] = _Worker(decoupled, list(affinity))
    return handle


def register_group(handle: int, *tensors: Tensor) -> None:
    """Add a group: params, two buffers each of gradients and of both moments, and where the new params are copied to.

    Raises:
        ValueError: another number of tensors.
    """
    if len(tensors) != 8:
        raise ValueError(explain("a group is 8 tensors", got=len(tensors)))
    _workers[handle].groups.append(tensors)


def destroy(handle: int) -> None:
    """Forget a worker."""
    _workers.pop(handle, None)


def control_size() -> int:
    """Bytes of shared memory that a worker and its orderer need."""
    return ctypes.sizeof(_Control)


def control_init(address: int, groups: int) -> None:
    """Prepare the shared bytes for so many groups.

    Raises:
        ValueError: too many.
    """
    if not 0 <= groups <= _MOST_GROUPS:
        raise ValueError(explain("groups", got=groups, expected=f"at most {_MOST_GROUPS}"))
    ctypes.memset(address, 0, ctypes.sizeof(_Control))
    _Control.from_address(address).groups = groups


def submit(address: int, buffer: int, step: int, *settings: Sequence[float]) -> None:
    """Order a step by the gradients of one of the two buffers; `settings` are lists over the groups, as in `_FIELDS`."""
    control = _Control.from_address(address)
    for name, values in zip(_FIELDS, settings, strict=True):
        getattr(control, name)[: control.groups] = [float(value) for value in values]
    control.buffer, control.step = buffer, step
    control.ordered += 1


def wait(address: int, timeout: float) -> bool:
    """Wait until a step that was ordered is done, and take note; False where none is within `timeout` seconds."""
    control = _Control.from_address(address)
    until = time.monotonic() + timeout
    while control.done == control.noted:
        if time.monotonic() >= until:
            return False
        time.sleep(_NAP)
    control.noted += 1
    return True


def control_exit(address: int) -> None:
    """Let the worker return."""
    _Control.from_address(address).ended = 1


@torch.no_grad()
def run_worker(handle: int, address: int) -> None:
    """Step as it is ordered, until `control_exit`."""
    worker, control = _workers[handle], _Control.from_address(address)
    if worker.cores and hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # cores that this process may not have
            os.sched_setaffinity(0, worker.cores)
    taken = 0
    while True:
        if control.ordered == taken:
            if control.ended:
                return
            time.sleep(_NAP)
            continue
        taken += 1
        for index, group in enumerate(worker.groups):
            _step(worker, group, control, index)
        control.done += 1


def _step(worker: _Worker, group: tuple[Tensor, ...], control: _Control, index: int) -> None:
    param, *pairs, stale = group
    grad, exp_avg, exp_avg_sq = (pairs[2 * i + control.buffer] for i in range(3))
    lr, beta1, beta2, eps, decay, correction = (getattr(control, n)[index] for n in _FIELDS)
    rule = (lr, beta1, beta2, eps, decay, control.step, worker.decoupled, bool(correction), 1.0)
    adam_step(param.detach(), exp_avg, exp_avg_sq, grad, None, *rule)
    stale.copy_(param)
