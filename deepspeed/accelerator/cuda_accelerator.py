# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: torch.cuda behind the accelerator interface. Making one initialises nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .abstract_accelerator import DeepSpeedAccelerator, Index

nvtx: Any
try:
    import nvtx  # a package of its own, which knows domains
except ImportError:
    nvtx = None


class CUDA_Accelerator(DeepSpeedAccelerator):
    """The CUDA devices that torch sees."""

    supports_nvtx_domain = True

    def __init__(self) -> None:
        self._name = "cuda"
        self._nvtx_domains: dict[str, Any] = {}
        # torch's Windows builds carry no NCCL
        self._communication_backend_name = "gloo" if sys.platform == "win32" else "nccl"

    # ------------------------------------------------------------------ behaviour
    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return False

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    # ------------------------------------------------------------------ devices
    def device_name(self, device_index: Index = None) -> str:
        if device_index is None:
            return "cuda"
        if isinstance(device_index, int):
            return f"cuda:{device_index}"
        return str(torch.device(device_index))

    def device(self, device_index: Index = None) -> AbstractContextManager[Any]:
        return torch.cuda.device(device_index)

    def set_device(self, device_index: Index) -> None:
        torch.cuda.set_device(device_index)

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def current_device_name(self) -> str:
        return f"cuda:{torch.cuda.current_device()}"

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def synchronize(self, device_index: Index = None) -> None:
        torch.cuda.synchronize(device_index)

    # ------------------------------------------------------------------ random numbers
    def set_rng_state(self, new_state: torch.Tensor, device_index: Index = None) -> None:
        torch.cuda.set_rng_state(new_state, "cuda" if device_index is None else device_index)

    def get_rng_state(self, device_index: Index = None) -> torch.Tensor:
        return torch.cuda.get_rng_state("cuda" if device_index is None else device_index)

    def manual_seed(self, seed: int) -> None:
        torch.cuda.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.cuda.manual_seed_all(seed)

    def initial_seed(self) -> int:
        return torch.cuda.initial_seed()

    def default_generator(self, device_index: int) -> torch.Generator:
        torch.cuda.init()
        return torch.cuda.default_generators[device_index]

    # ------------------------------------------------------------------ streams
    @property
    def Stream(self) -> Any:
        return torch.cuda.Stream

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def current_stream(self, device_index: Index = None) -> Any:
        return torch.cuda.current_stream(device_index)

    def default_stream(self, device_index: Index = None) -> Any:
        return torch.cuda.default_stream(device_index)

    @property
    def Event(self) -> Any:
        return torch.cuda.Event

    # ------------------------------------------------------------------ memory
    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory_allocated(self, device_index: Index = None) -> int:
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: Index = None) -> int:
        return torch.cuda.max_memory_allocated(device_index)

    def reset_max_memory_allocated(self, device_index: Index = None) -> None:
        torch.cuda.reset_peak_memory_stats(device_index)

    def memory_stats(self, device_index: Index = None) -> dict[str, Any]:
        return torch.cuda.memory_stats(device_index)

    def reset_peak_memory_stats(self, device_index: Index = None) -> None:
        torch.cuda.reset_peak_memory_stats(device_index)

    def memory_reserved(self, device_index: Index = None) -> int:
        return torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index: Index = None) -> int:
        return torch.cuda.max_memory_reserved(device_index)

    def total_memory(self, device_index: Index = None) -> int:
        index = torch.cuda.current_device() if device_index is None else device_index
        return int(torch.cuda.get_device_properties(index).total_memory)

    def available_memory(self, device_index: Index = None) -> int:
        """Return what the driver has free, plus what torch's allocator holds unused."""
        free, _ = torch.cuda.mem_get_info(device_index)
        held = torch.cuda.memory_reserved(device_index) - torch.cuda.memory_allocated(device_index)
        return int(free + held)

    # ------------------------------------------------------------------ data types
    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        """True from compute capability 5.3 on, the first with half-precision arithmetic."""
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (5, 3)

    # ------------------------------------------------------------------ miscellaneous
    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def range_push(self, msg: str, domain: str | None = None, category: str | None = None) -> Any:
        if nvtx is None or domain is None:
            return torch.cuda.nvtx.range_push(msg)
        if domain not in self._nvtx_domains:
            self._nvtx_domains[domain] = nvtx.get_domain(domain)
        return self._nvtx_domains[domain].push_range(message=msg, category=category)

    def range_pop(self, domain: str | None = None) -> Any:
        if nvtx is None or domain is None:
            return torch.cuda.nvtx.range_pop()
        return self._nvtx_domains[domain].pop_range()

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return torch.cuda._lazy_call(callback)

    def is_triton_supported(self) -> bool:
        return (
            sys.platform != "win32"
            and torch.cuda.is_available()
            and torch.cuda.get_device_capability() >= (8, 0)
        )

    def is_current_stream_capturing(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def create_graph(self) -> Any:
        return torch.cuda.CUDAGraph()

    def capture_to_graph(
        self, graph: Any, pool: Any = None, stream: Any = None
    ) -> AbstractContextManager[Any]:
        return torch.cuda.graph(graph, pool=pool, stream=stream)

    def replay_graph(self, graph: Any) -> None:
        graph.replay()

    def _pins_host_memory(self) -> bool:
        return torch.cuda.is_available()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cuda"

    def export_envs(self) -> list[str]:
        return ["NCCL"]

    # ------------------------------------------------------------------ tensor constructors
    @property
    def BFloat16Tensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.bfloat16, device="cuda")

    @property
    def ByteTensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.uint8, device="cuda")

    @property
    def DoubleTensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.float64, device="cuda")

    @property
    def FloatTensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.float32, device="cuda")

    @property
    def HalfTensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.float16, device="cuda")

    @property
    def IntTensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.int32, device="cuda")

    @property
    def LongTensor(self) -> Any:
        return functools.partial(torch.tensor, dtype=torch.int64, device="cuda")
