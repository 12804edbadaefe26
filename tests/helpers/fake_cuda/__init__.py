# SPDX-License-Identifier: Apache-2.0
"""Four CUDA devices for a torch without CUDA, that tell what a GPU would only sometimes show.

`install()` makes `torch.device("cuda")` real in this process: tensors have `is_cuda`, streams, events, page-locked memory,
amp and autograd's device threads, so the code for GPUs runs on any machine with a C++ compiler. The arithmetic is the
CPU's. See [Note: What is checked] in device.cpp for what it watches: races of streams, host memory that is read or
changed before a copy is done, host code that follows a device address, operands on different devices.

What it cannot tell: speed, rounding of real kernels, NCCL, limits of real memory.

`check()` raises if anything was wrong so far, `forget()` starts anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-DAT_PER_OPERATOR_HEADERS")

_library: Any = None


def missing() -> str | None:
    """Why there can be no fake device here; None if there can."""
    import torch

    if sys.platform != "linux":
        return "the fake CUDA device maps memory as Linux does"
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this torch knows CUDA itself"
    if shutil.which("g++") is None:
        return "the fake CUDA device is compiled by g++, which is not here"
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 13):
        return "the fake CUDA device is written against the insides of torch 2.13"
    return None


def build(folder: Path | None = None) -> Path:
    """Compile the device, once for each state of its source and torch; returns the library's path."""
    import torch

    source = HERE / "device.cpp"
    words = (*FLAGS, torch.__version__)
    state = hashlib.sha256(source.read_bytes() + repr(words).encode()).hexdigest()
    folder = folder or Path(tempfile.gettempdir()) / "ds_fake_cuda"
    library = folder / f"{state[:24]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    headers = (home / "include", home / "include" / "torch" / "csrc" / "api" / "include")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "fake.so"
        command = ["g++", *FLAGS, *(word for h in headers for word in ("-isystem", str(h)))]
        command += ["-o", str(made), str(source), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(
            [*command, f"-Wl,-rpath,{home / 'lib'}"], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        made.replace(library)
    return library


def install() -> None:
    """Give this process its devices; for good, so tests do it in processes of their own."""
    global _library
    if _library is not None:
        return
    import torch

    _library = ctypes.CDLL(str(build()))
    _library.fc_memory.restype = ctypes.c_int64
    _library.fc_violation.restype = ctypes.c_char_p
    _patch_c(torch)
    _patch_torch(torch)


def on_rank(rank: int) -> str:
    """Give a rank's process the devices, one of them its own; returns the accelerator's name."""
    import torch

    os.environ["DS_ACCELERATOR"] = "cuda"
    install()
    torch.cuda.set_device(rank)
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()._name


def check() -> None:
    """Raise AssertionError if something was wrong since the beginning, or since `forget`."""
    for device in range(_library.fc_devices()):
        _library.fc_synchronize(device)
    found = [_library.fc_violation(i).decode() for i in range(_library.fc_violations())]
    forget()
    assert not found, "\n".join(found)


def forget() -> None:
    """Forget what was wrong."""
    _library.fc_forget()


@contextlib.contextmanager
def open_memory() -> Iterator[None]:
    """Let the host reach device memory, for the time of a kernel that it plays."""
    _library.fc_open(1)
    try:
        yield
    finally:
        _library.fc_open(0)


def _patch_c(torch: Any) -> None:
    """What torch.cuda asks of the C extension."""
    lib = _library

    def exchange(device: int) -> int:
        before = lib.fc_device()
        if device >= 0:
            set_device(device)
        return before

    def set_device(device: int) -> None:
        if not 0 <= device < lib.fc_devices():
            raise RuntimeError("CUDA error: invalid device ordinal")
        lib.fc_set_device(device)

    def synchronize() -> None:
        if lib.fc_synchronize(lib.fc_device()):
            raise RuntimeError(f"fake CUDA: {lib.fc_violation(lib.fc_violations() - 1).decode()}")

    def memory_stats(device: int) -> dict[str, Any]:
        now, peak, total = (lib.fc_memory(device, what) for what in range(3))
        sizes = dict(current=now, peak=peak, allocated=peak, freed=peak - now)
        counts = dict(current=1, peak=1, allocated=total, freed=total - 1)
        kinds = ("all", "small_pool", "large_pool")
        names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
        stats: dict[str, Any] = {name: {kind: dict(sizes) for kind in kinds} for name in names}
        stats.update({n: {k: dict(counts) for k in kinds} for n in ("allocation", "segment")})
        return {**stats, "num_ooms": 0, "num_alloc_retries": 0}

    home = dict(
        _cuda_init=lambda: None,
        _cuda_getDeviceCount=lambda: lib.fc_devices(),  # torch.compile wants functions that hash
        _cuda_getDevice=lambda: lib.fc_device(),
        _cuda_setDevice=set_device,
        _cuda_exchangeDevice=exchange,
        _cuda_maybeExchangeDevice=lambda device: exchange(device),
        _cuda_synchronize=synchronize,
        _cuda_getCurrentStream=lambda index: (lib.fc_stream(_index(index)), _index(index), 1),
        _cuda_getDefaultStream=lambda index: (0, _index(index), 1),
        _cuda_setStream=lambda stream_id, device_index, device_type: (
            set_device(device_index),
            lib.fc_set_stream(device_index, stream_id),
        )[0],
        _cuda_memoryStats=memory_stats,
        _cuda_resetPeakMemoryStats=lambda device: lib.fc_reset_peak(device),
        _cuda_resetAccumulatedMemoryStats=lambda device: None,
        _cuda_emptyCache=lambda: None,
        _cuda_ipc_collect=lambda: None,
        _host_emptyCache=lambda: None,
        _cuda_isInBadFork=lambda: False,
        _cuda_isCurrentStreamCapturing=lambda: bool(lib.fc_capturing()),
        _cuda_getCurrentRawStream=lambda index: lib.fc_stream(_index(index)),
        _cuda_getArchFlags=lambda: "sm_80",
        _cuda_getAllocatorBackend=lambda: "native",
    )
    for name, function in home.items():
        setattr(torch._C, name, function)


def _index(index: int) -> int:
    return _library.fc_device() if index < 0 else index


def _patch_torch(torch: Any) -> None:
    """The parts of torch's Python side that were chosen at import, without CUDA."""
    cuda = torch.cuda

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **given: Any) -> Any:
            if "stream_id" in given:
                return super().__new__(cls, **given)
            index = cuda._utils._get_device_index(device, optional=True)
            return super().__new__(cls, device=torch.device("cuda", index), priority=priority)

        @property
        def cuda_stream(self) -> int:
            return 0 if self.stream_id == 0 else 16 * self.device_index + self.stream_id + 1

    class Event:  # torch.Event compares with no subclass of its own
        def __new__(cls, enable_timing: bool = False, **_: Any) -> Any:
            return torch.Event(device="cuda", enable_timing=enable_timing)

    for module in (cuda, cuda.streams):
        module.Stream, module.Event = Stream, Event
    properties = SimpleNamespace(
        name="Fake CUDA device",
        major=8,
        minor=0,
        total_memory=_library.fc_memory(0, 3),
        multi_processor_count=108,
        warp_size=32,
        is_integrated=False,
        gcnArchName="",
    )
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: properties.name
    cuda.is_current_stream_capturing = lambda: bool(_library.fc_capturing())
    cuda.CUDAGraph = cuda.graphs.CUDAGraph = Graph
    cuda.mem_get_info = cuda.memory.mem_get_info = lambda device=None: (
        properties.total_memory - cuda.memory_allocated(device),
        properties.total_memory,
    )
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0
    cuda.default_generators = tuple(
        torch.Generator(device=f"cuda:{i}") for i in range(_library.fc_devices())
    )
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda._lazy_init = lambda: setattr(cuda, "_initialized", True)
    cuda._initialized = True
    _patch_storage(torch)


class Graph:
    """torch.cuda.CUDAGraph: operations that are remembered while they are captured, and made again."""

    _made = 0

    def __init__(self, keep_graph: bool = False) -> None:
        Graph._made += 1
        self._number = Graph._made

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        """From here on operations are remembered."""
        _library.fc_graph_begin(self._number)

    def capture_end(self) -> None:
        """What was captured has not happened; its results hold garbage until `replay`."""
        _library.fc_graph_end()

    def replay(self) -> None:
        """Make the operations."""
        _library.fc_graph_replay(self._number)

    def reset(self) -> None:
        """Let go of the memory."""
        _library.fc_graph_reset(self._number)

    def pool(self) -> tuple[int, int]:
        """Pools are not told apart."""
        return (0, self._number)


def _patch_storage(torch: Any) -> None:
    host_resize = torch.UntypedStorage.resize_

    def resize_(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return host_resize(self, size)
        _library.fc_resize(ctypes.c_void_p(self._cdata), ctypes.c_size_t(size))
        return self

    host_new = torch.UntypedStorage.__new__

    def new(cls: Any, *args: Any, device: Any = None, **given: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return host_new(cls, *args, **given, **({} if device is None else {"device": device}))
        size = args[0] if args else 0
        return torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()

    torch.UntypedStorage.resize_, torch.UntypedStorage.__new__ = resize_, new
