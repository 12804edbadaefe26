# SPDX-License-Identifier: Apache-2.0
"""The interface that every accelerator fulfils, and what all of them do alike."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, TypeAlias

import torch

from deepspeed.utils import env
from deepspeed.utils.errors import explain

Index: TypeAlias = "int | str | torch.device | None"


class DeepSpeedAccelerator(abc.ABC):
    """What the rest of the package, and scripts, may ask of the machine.

    ``device_index`` is always optional: None is the current device; an int, a string or a
    torch.device is taken as torch takes it.

    Attributes:
        _name: "cpu" or "cuda".
        _communication_backend_name: the default backend of torch.distributed for this device.
    """

    supports_nvtx_domain = False
    _name: str
    _communication_backend_name: str
    _compile_backend = "inductor"

    # ------------------------------------------------------------------ behaviour
    @abc.abstractmethod
    def is_synchronized_device(self) -> bool:
        """Say whether an operation is finished when its call returns."""

    @abc.abstractmethod
    def use_host_timers(self) -> bool:
        """Say whether time is measured by the host's clock rather than by device events."""

    @abc.abstractmethod
    def resolves_data_dependency(self) -> bool:
        """Say whether the device orders dependent work on different streams by itself."""

    @abc.abstractmethod
    def handles_memory_backpressure(self) -> bool:
        """Say whether launching far ahead cannot exhaust the device's memory."""

    # ------------------------------------------------------------------ devices
    @abc.abstractmethod
    def device_name(self, device_index: Index = None) -> str:
        """Return the name that torch.device takes: "cpu", "cuda" or "cuda:0"."""

    @abc.abstractmethod
    def device(self, device_index: Index = None) -> AbstractContextManager[Any]:
        """Return a context in which the device is the current one."""

    @abc.abstractmethod
    def set_device(self, device_index: Index) -> None:
        """Make the device the current one."""

    @abc.abstractmethod
    def current_device(self) -> int:
        """Return the index of the current device."""

    @abc.abstractmethod
    def current_device_name(self) -> str:
        """Return the name of the current device, with its index where it has one."""

    @abc.abstractmethod
    def device_count(self) -> int:
        """Return how many processes this machine should run by default."""

    @abc.abstractmethod
    def synchronize(self, device_index: Index = None) -> None:
        """Wait for all work on the device."""

    # ------------------------------------------------------------------ random numbers
    def random(self) -> ModuleType:
        """Return the module ``torch.random``."""
        return torch.random

    @abc.abstractmethod
    def set_rng_state(self, new_state: torch.Tensor, device_index: Index = None) -> None:
        """Set the state of the device's generator."""

    @abc.abstractmethod
    def get_rng_state(self, device_index: Index = None) -> torch.Tensor:
        """Return the state of the device's generator, a CPU uint8 tensor."""

    @abc.abstractmethod
    def manual_seed(self, seed: int) -> Any:
        """Seed the current device's generator."""

    @abc.abstractmethod
    def manual_seed_all(self, seed: int) -> Any:
        """Seed the generators of all devices of this kind."""

    @abc.abstractmethod
    def initial_seed(self) -> int:
        """Return the seed in force."""

    @abc.abstractmethod
    def default_generator(self, device_index: int) -> torch.Generator:
        """Return the device's default generator."""

    # ------------------------------------------------------------------ streams
    @property
    @abc.abstractmethod
    def Stream(self) -> Any:
        """The stream class, or None where there are no streams."""

    @abc.abstractmethod
    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context that runs work on ``stream``."""

    @abc.abstractmethod
    def current_stream(self, device_index: Index = None) -> Any:
        """Return the current stream, or None where there are no streams."""

    @abc.abstractmethod
    def default_stream(self, device_index: Index = None) -> Any:
        """Return the default stream, or None where there are no streams."""

    @property
    @abc.abstractmethod
    def Event(self) -> Any:
        """The event class, or None where there are no events."""

    # ------------------------------------------------------------------ memory, in bytes
    @abc.abstractmethod
    def empty_cache(self) -> None:
        """Give cached memory back to the device."""

    @abc.abstractmethod
    def memory_allocated(self, device_index: Index = None) -> int:
        """Return the bytes in use now."""

    @abc.abstractmethod
    def max_memory_allocated(self, device_index: Index = None) -> int:
        """Return the highest number of bytes in use since the last reset."""

    @abc.abstractmethod
    def reset_max_memory_allocated(self, device_index: Index = None) -> None:
        """Begin a new peak measurement."""

    @abc.abstractmethod
    def memory_stats(self, device_index: Index = None) -> dict[str, Any]:
        """Return torch's table of allocator statistics, as far as the device has them."""

    @abc.abstractmethod
    def reset_peak_memory_stats(self, device_index: Index = None) -> None:
        """Begin a new peak measurement of every statistic."""

    @abc.abstractmethod
    def memory_reserved(self, device_index: Index = None) -> int:
        """Return the bytes that the allocator holds."""

    @abc.abstractmethod
    def max_memory_reserved(self, device_index: Index = None) -> int:
        """Return the highest number of bytes held since the last reset."""

    @abc.abstractmethod
    def total_memory(self, device_index: Index = None) -> int:
        """Return the device's memory."""

    @abc.abstractmethod
    def available_memory(self, device_index: Index = None) -> int:
        """Return the memory that can still be had."""

    def memory_cached(self, device_index: Index = None) -> int:
        """Old name of `memory_reserved`."""
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index: Index = None) -> int:
        """Old name of `max_memory_reserved`."""
        return self.max_memory_reserved(device_index)

    def reset_max_memory_cached(self, device_index: Index = None) -> None:
        """Old name of `reset_peak_memory_stats`."""
        self.reset_peak_memory_stats(device_index)

    # ------------------------------------------------------------------ data types
    @abc.abstractmethod
    def is_bf16_supported(self) -> bool:
        """Say whether models can train in bf16."""

    @abc.abstractmethod
    def is_fp16_supported(self) -> bool:
        """Say whether models can train in fp16."""

    def is_fp64_supported(self) -> bool:
        """Say whether the device computes in float64."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that models can train in."""
        dtypes = [torch.float32]
        if self.is_fp16_supported():
            dtypes.append(torch.float16)
        if self.is_bf16_supported():
            dtypes.append(torch.bfloat16)
        return dtypes

    # ------------------------------------------------------------------ miscellaneous
    @abc.abstractmethod
    def is_available(self) -> bool:
        """Say whether the device can be used now."""

    def range_push(  # noqa: B027
        self, msg: str, domain: str | None = None, category: str | None = None
    ) -> Any:
        """Open a range in the profiler's timeline; nothing where there is no profiler."""

    def range_pop(self, domain: str | None = None) -> Any:  # noqa: B027
        """Close the innermost range."""

    @abc.abstractmethod
    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call ``callback`` once the device is initialised."""

    def communication_backend_name(self) -> str:
        """Return the default backend of torch.distributed for this device."""
        return self._communication_backend_name

    @abc.abstractmethod
    def is_triton_supported(self) -> bool:
        """Say whether Triton kernels run here."""

    def prefer_triton_grouped_mm(self) -> bool:
        """Say whether grouped products are better done by Triton than by torch."""
        return False

    # ------------------------------------------------------------------ graphs
    def is_current_stream_capturing(self) -> bool:
        """Say whether a graph is being captured on the current stream."""
        return False

    @abc.abstractmethod
    def create_graph(self) -> Any:
        """Return an empty graph, or None where there are no graphs."""

    @abc.abstractmethod
    def capture_to_graph(
        self, graph: Any, pool: Any = None, stream: Any = None
    ) -> AbstractContextManager[Any]:
        """Return a context that captures work into ``graph``."""

    @abc.abstractmethod
    def replay_graph(self, graph: Any) -> None:
        """Run a captured graph."""

    # ------------------------------------------------------------------ tensor constructors
    @property
    @abc.abstractmethod
    def BFloat16Tensor(self) -> Any:
        """Constructor of bf16 tensors on the device."""

    @property
    @abc.abstractmethod
    def ByteTensor(self) -> Any:
        """Constructor of uint8 tensors on the device."""

    @property
    @abc.abstractmethod
    def DoubleTensor(self) -> Any:
        """Constructor of float64 tensors on the device."""

    @property
    @abc.abstractmethod
    def FloatTensor(self) -> Any:
        """Constructor of float32 tensors on the device."""

    @property
    @abc.abstractmethod
    def HalfTensor(self) -> Any:
        """Constructor of fp16 tensors on the device."""

    @property
    @abc.abstractmethod
    def IntTensor(self) -> Any:
        """Constructor of int32 tensors on the device."""

    @property
    @abc.abstractmethod
    def LongTensor(self) -> Any:
        """Constructor of int64 tensors on the device."""

    # ------------------------------------------------------------------ page-locked host memory
    def _pins_host_memory(self) -> bool:
        """Say whether page-locked memory exists here (it speeds up copies to a device)."""
        return False

    def pin_memory(
        self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True
    ) -> torch.Tensor:
        """Return a tensor in page-locked host memory, as far as the machine has such.

        Args:
            tensor: a CPU tensor.
            make_copy: True gives its contents (the tensor itself, where nothing is to be done);
                False gives fresh memory of its dtype, not initialised.
            match_shape: with ``make_copy=False``: False makes the result flat.

        Raises:
            ValueError: the tensor is not on the CPU.
        """
        if tensor.device.type != "cpu":
            raise ValueError(
                explain(
                    "only host memory can be pinned",
                    got=f"a tensor on {tensor.device}",
                    expected="a CPU tensor",
                )
            )
        native = self._native_pins()
        if native is not None:
            pinned: torch.Tensor = native.pin(tensor, make_copy, match_shape)
            return pinned
        if make_copy:
            return tensor.pin_memory() if self._pins_host_memory() else tensor
        shape: Sequence[int] = tensor.shape if match_shape else (tensor.numel(),)
        return self.pin_empty(*shape, dtype=tensor.dtype)

    def pin_empty(
        self, *size: int, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Return a fresh page-locked tensor of ``size`` elements, not initialised."""
        return torch.empty(*size, dtype=dtype, device=device, pin_memory=self._pins_host_memory())

    def pin_empty_like(
        self,
        tensor: torch.Tensor,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return a fresh page-locked tensor of another tensor's shape."""
        return self.pin_empty(*tensor.shape, dtype=dtype or tensor.dtype, device=device)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Say whether the tensor is in page-locked memory."""
        native = self._native_pins()
        if native is not None and native.is_pinned(tensor):
            return True
        return self._pins_host_memory() and tensor.is_pinned()

    def unpin_memory(self, tensor: torch.Tensor) -> bool | None:
        """Unlock what the native backend locked; returns whether it had locked that tensor.

        None where torch locks pages, which unlocks them when the tensor dies.
        """
        native = self._native_pins()
        return None if native is None else bool(native.unpin(tensor))

    def _native_pins(self) -> Any:
        """Return the pages of DS_PIN_MEMORY_BACKEND=native, or None for torch's."""
        if not env.DS_PIN_MEMORY_BACKEND.get():
            return None
        pins = importlib.import_module("deepspeed.utils.pin_memory")
        return pins.get_active_native_pinned_memory()

    @abc.abstractmethod
    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Say whether the tensor is on a device of this kind."""

    # ------------------------------------------------------------------ op builders
    def op_builder_dir(self) -> str:
        """Return the module in which op builders are looked up."""
        return "deepspeed.ops.op_builder"

    def get_op_builder(self, class_name: str) -> Any:
        """Return the op builder class of that name, or None when there is none."""
        # imported by name, on demand: this layer does not know the ops above it
        return getattr(importlib.import_module(self.op_builder_dir()), class_name, None)

    def create_op_builder(self, class_name: str) -> Any:
        """Return an instance of the op builder of that name, or None when there is none."""
        builder = self.get_op_builder(class_name)
        return None if builder is None else builder()

    def build_extension(self) -> Any:
        """Return torch's BuildExtension command for setup scripts."""
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension

    # ------------------------------------------------------------------ launching
    def export_envs(self) -> list[str]:
        """Return the prefixes of variables that the launcher carries to other machines."""
        return []

    def visible_devices_envs(self) -> list[str]:
        """Return the variables that choose a process's devices."""
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(
        self, current_env: MutableMapping[str, str], local_accelerator_ids: Sequence[int | str]
    ) -> None:
        """Write the choice of devices into the environment of a process to be started."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    # ------------------------------------------------------------------ torch.compile
    def get_compile_backend(self) -> str:
        """Return the backend that torch.compile gets by default."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Choose the backend that torch.compile gets by default.

        Raises:
            ValueError: torch does not know the backend.
        """
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(
                explain("unknown compile backend", got=backend, expected=", ".join(known))
            )
        self._compile_backend = backend
