# SPDX-License-Identifier: Apache-2.0
"""The CPU as an accelerator: one device, no streams, memory measured by the process's size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psutil
import torch

from deepspeed.utils import env, numa

from .abstract_accelerator import DeepSpeedAccelerator, Index


class CPU_Accelerator(DeepSpeedAccelerator):
    """The host itself. Every index means the same device, ``cpu``."""

    def __init__(self) -> None:
        self._name = "cpu"
        self._communication_backend_name = "gloo"
        self._process = psutil.Process()
        self._peak = 0

    # ------------------------------------------------------------------ behaviour
    def is_synchronized_device(self) -> bool:
        return True

    def use_host_timers(self) -> bool:
        return True

    def resolves_data_dependency(self) -> bool:
        return True

    def handles_memory_backpressure(self) -> bool:
        return True

    # ------------------------------------------------------------------ device
    def device_name(self, device_index: Index = None) -> str:
        return "cpu"

    def device(self, device_index: Index = None) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def set_device(self, device_index: Index) -> None:
        """Do nothing: there is one device."""

    def current_device(self) -> int:
        return env.LOCAL_RANK.get() or 0

    def current_device_name(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        """Return LOCAL_SIZE when a launcher set it, else the number of NUMA nodes with cores."""
        return env.LOCAL_SIZE.get() or len(numa.get_numa_cores())

    def synchronize(self, device_index: Index = None) -> None:
        """Do nothing: the work is done when its call returns."""

    # ------------------------------------------------------------------ random numbers
    def set_rng_state(self, new_state: torch.Tensor, device_index: Index = None) -> None:
        torch.set_rng_state(new_state)

    def get_rng_state(self, device_index: Index = None) -> torch.Tensor:
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> torch.Generator:
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> torch.Generator:
        return torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def default_generator(self, device_index: int) -> torch.Generator:
        return torch.default_generator

    # ------------------------------------------------------------------ streams
    @property
    def Stream(self) -> None:
        return None

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def current_stream(self, device_index: Index = None) -> None:
        return None

    def default_stream(self, device_index: Index = None) -> None:
        return None

    @property
    def Event(self) -> None:
        return None

    # ------------------------------------------------------------------ memory
    def empty_cache(self) -> None:
        """Do nothing: torch keeps no cache of host memory."""

    def get_rss(self) -> int:
        """Return the bytes of physical memory that the process holds, and note the peak."""
        resident = self._process.memory_info().rss
        self._peak = max(self._peak, resident)
        return resident

    def reset_rss(self) -> int:
        """Begin a new peak measurement; return the bytes held now."""
        self._peak = 0
        return self.get_rss()

    def memory_allocated(self, device_index: Index = None) -> int:
        return self.get_rss()

    def max_memory_allocated(self, device_index: Index = None) -> int:
        """Return the highest value that any memory call of this object saw since the reset."""
        self.get_rss()
        return self._peak

    def reset_max_memory_allocated(self, device_index: Index = None) -> None:
        self.reset_rss()

    def memory_stats(self, device_index: Index = None) -> dict[str, Any]:
        now = self.get_rss()
        return {"allocated_bytes.all.current": now, "allocated_bytes.all.peak": self._peak}

    def reset_peak_memory_stats(self, device_index: Index = None) -> None:
        self.reset_rss()

    def memory_reserved(self, device_index: Index = None) -> int:
        return self.get_rss()

    def max_memory_reserved(self, device_index: Index = None) -> int:
        return self.max_memory_allocated()

    def total_memory(self, device_index: Index = None) -> int:
        return int(psutil.virtual_memory().total)

    def available_memory(self, device_index: Index = None) -> int:
        return int(psutil.virtual_memory().available)

    # ------------------------------------------------------------------ data types
    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        """True on every CPU: products go through fp32 where the CPU has no native ones."""
        return True

    # ------------------------------------------------------------------ miscellaneous
    def is_available(self) -> bool:
        return True

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    def is_triton_supported(self) -> bool:
        return False

    def create_graph(self) -> None:
        return None

    def capture_to_graph(
        self, graph: Any, pool: Any = None, stream: Any = None
    ) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def replay_graph(self, graph: Any) -> None:
        """Do nothing: there are no graphs."""

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    # ------------------------------------------------------------------ tensor constructors
    @property
    def BFloat16Tensor(self) -> Any:
        return torch.BFloat16Tensor

    @property
    def ByteTensor(self) -> Any:
        return torch.ByteTensor

    @property
    def DoubleTensor(self) -> Any:
        return torch.DoubleTensor

    @property
    def FloatTensor(self) -> Any:
        return torch.FloatTensor

    @property
    def HalfTensor(self) -> Any:
        return torch.HalfTensor

    @property
    def IntTensor(self) -> Any:
        return torch.IntTensor

    @property
    def LongTensor(self) -> Any:
        return torch.LongTensor
