# SPDX-License-Identifier: Apache-2.0
"""Random numbers that can be drawn twice: named streams of the device, and snapshots of all generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain

MODEL_PARALLEL_STREAM = "model-parallel-rng"


class CudaRNGStatesTracker:
    """Named random streams of the accelerator (of the CPU, where that computes).

    Inside `fork(name)` the device draws from the stream of that name, which goes on where it stopped last; outside,
    from its default one. Tensor-parallel layers draw different dropout masks on each rank this way, and the same
    ones outside.
    """

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all streams."""
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """Where each stream stands."""
        return {name: state.clone() for name, state in self.states_.items()}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Put the streams where `get_states` found them."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Make a stream; the device's current one is left where it is.

        Raises:
            Exception: the seed or the name is taken.
        """
        if seed in self.seeds_:
            raise Exception(f"seed {seed} already exists")
        if name in self.states_:
            raise Exception(f"cuda rng state {name} already exists")
        self.seeds_.add(seed)
        device = get_accelerator()
        outside = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        device.set_rng_state(outside)

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL_STREAM) -> Iterator[None]:
        """Draw from the stream `name` inside the context.

        Raises:
            Exception: there is no such stream.
        """
        if name not in self.states_:
            raise Exception(
                explain(f"cuda rng state {name} is not added", fix="Call add() with a seed first.")
            )
        device = get_accelerator()
        outside = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(outside)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """The streams of this process."""
    return _tracker


@dataclass(frozen=True)
class RngSnapshot:
    """Where all generators stand that a block may draw from: the CPU's, its devices', the named streams.

    Attributes:
        cpu: state of the CPU's generator.
        devices: index of an accelerator -> state of its generator.
        streams: the named streams of the tracker.
    """

    cpu: torch.Tensor
    devices: dict[int, torch.Tensor]
    streams: dict[str, torch.Tensor]

    @classmethod
    def take(cls, tensors: Iterable[torch.Tensor] = ()) -> RngSnapshot:
        """Note the states now; `tensors` are what the block computes with (their devices, and the current one)."""
        device = get_accelerator()
        indices: set[int] = set()
        if device.device_name() != "cpu":
            indices = {t.get_device() for t in tensors if device.on_accelerator(t)}
            indices.add(int(device.current_device()))
        return cls(
            torch.get_rng_state(),
            {index: device.get_rng_state(index) for index in sorted(indices)},
            _tracker.get_states(),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers again inside the context; afterwards all generators stand where they stood."""
        outside = RngSnapshot(
            torch.get_rng_state(),
            {index: get_accelerator().get_rng_state(index) for index in self.devices},
            _tracker.get_states(),
        )
        self._apply()
        try:
            yield
        finally:
            outside._apply()

    def _apply(self) -> None:
        torch.set_rng_state(self.cpu)
        for index, state in self.devices.items():
            get_accelerator().set_rng_state(state, index)
        _tracker.set_states({name: state.clone() for name, state in self.streams.items()})
