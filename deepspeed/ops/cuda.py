# SPDX-License-Identifier: Apache-2.0
"""Which code runs each CUDA kernel on each device, chosen at the first call and told by `routes`.

The order: the cubin of the very GPU, the best cubin of its generation, PTX (compiled by the driver), NVRTC on this
machine, and at last the torch reference. Whatever stops a choice is kept as the reason for the next, and nothing on
the way is fatal: a damaged pack or an old driver leaves torch alone to do the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.ops import cuda_nvrtc
from deepspeed.ops.cuda_cache import KernelCompiler
from deepspeed.ops.cuda_driver import CudaDriverError, Driver, Function
from deepspeed.ops.cuda_nvrtc import NvrtcError
from deepspeed.ops.cuda_pack import Image, KernelPack, KernelPackError, hash_of_sources
from deepspeed.utils import env
from deepspeed.utils.logging import logger

PACK_PATH = Path(__file__).resolve().parent / "lib" / "kernels.zip"
SOURCE_TREE = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BLOCK_LIMIT = (1 << 31) - 1


class CudaRoute(NamedTuple):
    """How a kernel runs on a device.

    Attributes:
        name: the kernel.
        device: index of the device, or None where there is none.
        route: "cubin", "ptx", "nvrtc" or "reference".
        reason: what was taken, and why nothing better was.
    """

    name: str
    device: int | None
    route: str
    reason: str


class _Choice(NamedTuple):
    """A unit on a device: its kernels (none when the references serve), route and reason."""

    functions: dict[str, Function]
    route: str
    reason: str


class TorchSide:
    """What the loader asks of torch; the tests put another in its place."""

    def device_of(self, tensor: Tensor) -> int | None:
        """Return the index of the tensor's CUDA device, or None where it is on none."""
        return tensor.device.index if tensor.is_cuda else None

    def stream(self, device: int) -> int:
        """Return the handle of torch's current stream on a device."""
        return torch.cuda.current_stream(device).cuda_stream

    def capturing(self) -> bool:
        """Say whether a CUDA graph is being captured, in which no module can be loaded."""
        return torch.cuda.is_current_stream_capturing()

    def devices(self) -> int:
        """Return the number of CUDA devices."""
        return torch.cuda.device_count() if torch.version.cuda else 0


class Loader:
    """Finds, loads and keeps kernels.

    Args:
        torch_side: what it knows of tensors and streams.
        open_driver: opens the driver; called at the first use.
        pack_path: where the pack is.
    """

    def __init__(
        self,
        torch_side: TorchSide | None = None,
        open_driver: Callable[[], Driver] = Driver,
        pack_path: Path | None = None,
    ) -> None:
        self.torch = torch_side or TorchSide()
        self._open_driver = open_driver
        self._pack_path = pack_path or Path(env.DS_KERNEL_PACK.get() or PACK_PATH)
        self._lock = threading.RLock()
        self._choices: dict[tuple[int, str], _Choice] = {}
        self._functions: dict[tuple[int, str], Function | None] = {}
        self._opened = False
        self._driver: Driver | None = None
        self._units: dict[str, dict[str, str]] = {}
        self._unit_of: dict[str, str] = {}
        self._pack: KernelPack | None = None
        self._compiler: KernelCompiler | None = None
        self._problem = ""  # why kernels cannot run at all
        self._pack_problem = ""

    def find(self, name: str, tensor: Tensor) -> Callable[..., None] | None:
        """Return ``launch(blocks, *args)`` of a kernel for the tensor's device and current stream, or None.

        None means that the reference is to be used.
        """
        device = self.torch.device_of(tensor)
        if device is None:
            return None
        key = (device, name)
        function = self._functions[key] if key in self._functions else self._resolve(key)
        if function is None or self._driver is None:
            return None
        return partial(self._driver.launch, device, function, self.torch.stream(device))

    def routes(self) -> list[CudaRoute]:
        """Return how each kernel runs on each device, loading what was not loaded yet. Never raises."""
        with self._lock:
            self._open()
            count = 0 if self._problem else self.torch.devices()
            if not count:
                problem = self._problem or "torch sees no CUDA device"
                return [CudaRoute(name, None, "reference", problem) for name in self._unit_of]
            told = []
            for device in range(count):
                for name, unit in self._unit_of.items():
                    choice = self._choose(device, unit)
                    told.append(CudaRoute(name, device, choice.route, choice.reason))
            return told

    def _resolve(self, key: tuple[int, str]) -> Function | None:
        device, name = key
        with self._lock:
            self._open()
            unit = self._unit_of.get(name)
            if self._problem or unit is None:
                self._functions[key] = None
                return None
            if (device, unit) not in self._choices and self.torch.capturing():
                return None  # this call runs in torch; the next one outside of the capture decides
            self._functions[key] = self._choose(device, unit).functions.get(name)
            return self._functions[key]

    def _choose(self, device: int, unit: str) -> _Choice:
        if (device, unit) not in self._choices:
            try:
                choice = self._first_that_loads(device, unit)
            except CudaDriverError as error:
                choice = _Choice({}, "reference", str(error))
            said = logger.warning if choice.route == "reference" else logger.info
            said("CUDA kernels %s on device %d: %s (%s)", unit, device, choice.route, choice.reason)
            self._choices[device, unit] = choice
        return self._choices[device, unit]

    def _first_that_loads(self, device: int, unit: str) -> _Choice:
        assert self._driver is not None
        capability = self._driver.capability(device)
        passed = []
        for route, told, get in self._candidates(unit, capability, passed):
            try:
                image, more = get()
                functions = self._driver.load(device, image, self._units[unit])
            except (CudaDriverError, KernelPackError, NvrtcError) as error:
                passed.append(str(error))
                continue
            reason = "; ".join((f"{told}{more}", *(f"not better: {p}" for p in passed)))
            return _Choice(functions, route, reason)
        return _Choice({}, "reference", "; ".join(passed))

    def _candidates(
        self, unit: str, capability: tuple[int, int], passed: list[str]
    ) -> Iterator[tuple[str, str, Callable[[], tuple[bytes, str]]]]:
        """Yield what could serve, best first, as (route, words, how to get it); reasons against go to `passed`."""
        if self._pack_problem:
            passed.append(self._pack_problem)
        if self._pack is not None:
            pack = self._pack
            for image in _in_order(pack, unit, capability, self._driver_version(), passed):
                route = "ptx" if image.is_ptx else "cubin"

                def read(arch: str = image.arch) -> tuple[bytes, str]:
                    return pack.image(unit, arch), ""

                yield route, f"{image.arch} of {pack.path.name}", read
        if self._compiler is not None:
            compiler = self._compiler
            yield "nvrtc", "", lambda: compiler.image(unit, capability)

    def _driver_version(self) -> int:
        return self._driver.version if self._driver is not None else 0

    def _open(self) -> None:
        """Read the index and open the driver, once."""
        if self._opened:
            return
        self._opened = True
        tree = _tree()
        sources = self._open_pack(tree)
        if sources is None:
            sources = tree
        if sources is None:
            self._problem = self._pack_problem or f"there is no {self._pack_path}"
        else:
            self._compiler = KernelCompiler(sources)
            if self._pack is None:
                self._units = _units_of(sources)
        self._unit_of = {name: unit for unit, kernels in self._units.items() for name in kernels}
        if env.DS_DISABLE_NATIVE.get():
            self._problem = "DS_DISABLE_NATIVE asks for the torch references"
        if not self._problem and not self.torch.devices():
            self._problem = "torch sees no CUDA device"
        if not self._problem:
            try:
                self._driver = self._open_driver()
            except CudaDriverError as error:
                self._problem = str(error)

    def _open_pack(self, tree: dict[str, str] | None) -> dict[str, str] | None:
        """Read the pack's index; returns the sources to compile where no image serves, None for the tree's."""
        if not self._pack_path.exists():
            return None
        try:
            pack = KernelPack(self._pack_path)
            sources = pack.sources()
        except KernelPackError as error:
            self._pack_problem = str(error)
            return None
        if env.DS_KERNEL_SOURCE.get():
            self._pack_problem = "DS_KERNEL_SOURCE asks for kernels compiled from source"
            return sources if tree is None else None
        if tree is not None and hash_of_sources(tree) != pack.source_hash:
            self._pack_problem = (
                f"{self._pack_path} was made from other sources than {SOURCE_TREE}; "
                "run python -m op_builder.kernels"
            )
            return None
        self._pack = pack
        self._units = {name: unit.kernels for name, unit in pack.units.items()}
        return sources


def find(name: str, tensor: Tensor) -> Callable[..., None] | None:
    """Return ``launch(blocks, *args)`` of a kernel for the tensor's device and stream; None for the reference."""
    return _loader.find(name, tensor)


def routes() -> list[CudaRoute]:
    """Return how each CUDA kernel runs on each device of this machine, and why. Never raises."""
    return _loader.routes()


def summary() -> dict[str, Any]:
    """Return the routes for a report, as a dict that JSON can hold: one route and reason, and every kernel's own."""
    told = routes()
    kinds = sorted(
        {
            (r.route, r.reason if r.device is None else f"device {r.device}: {r.reason}")
            for r in told
        }
    )
    names = sorted({route for route, _ in kinds})
    return {
        "route": names[0] if len(names) == 1 else "mixed" if names else "reference",
        "reason": "; ".join(reason for _, reason in kinds)
        or "there is neither a pack nor a source",
        "kernels": [route._asdict() for route in told],
    }


def use(loader: Loader) -> Loader:
    """Put another loader in the place of the one in use, which is returned."""
    global _loader
    before, _loader = _loader, loader
    return before


def on_device(tensor: Tensor) -> bool:
    """Say whether the tensor lives where kernels run."""
    return _loader.torch.device_of(tensor) is not None


def stream_key(tensor: Tensor) -> tuple[int | None, int]:
    """Return what tells apart launches that may overlap: device and stream of the next launch for the tensor."""
    device = _loader.torch.device_of(tensor)
    return device, 0 if device is None else _loader.torch.stream(device)


def _in_order(
    pack: KernelPack,
    unit: str,
    capability: tuple[int, int],
    driver: int,
    passed: list[str],
) -> list[Image]:
    """Return the images that the GPU and the driver can run, best first."""
    images = pack.units[unit].images.values()
    gpu = f"sm_{capability[0]}{capability[1]}"
    if not images:
        passed.append("the pack holds sources only")
        return []
    cubins = [image for image in images if not image.is_ptx]
    near = [c for c in cubins if c.capability[0] == capability[0] and c.capability <= capability]
    near.sort(key=lambda image: image.capability, reverse=True)
    ptx = [image for image in images if image.is_ptx and image.capability <= capability]
    ptx.sort(key=lambda image: image.capability, reverse=True)
    if not near:
        oldest = min((image.capability for image in images), default=capability)
        older = " (the GPU is older than any kernel)" if capability < oldest else ""
        passed.append(f"no cubin for {gpu}{older}")
    elif driver < pack.driver_floor:
        passed.append(_too_old(driver, pack.driver_floor, "cubins"))
        near = []
    if ptx and driver < pack.ptx_driver_floor:
        if not near:
            passed.append(_too_old(driver, pack.ptx_driver_floor, "PTX"))
        ptx = []
    return near + ptx


def _too_old(driver: int, floor: int, what: str) -> str:
    return (
        f"the driver (CUDA {_dotted(driver)}) is too old for the pack's {what} "
        f"(CUDA {_dotted(floor)}): update it"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _tree() -> dict[str, str] | None:
    """Return the sources beside an uninstalled package, or None."""
    try:
        paths = [p for p in SOURCE_TREE.glob("*.cu*") if p.suffix in (".cu", ".cuh")]
        texts = {p.name: p.read_text(encoding="utf-8").replace("\r\n", "\n") for p in paths}
    except OSError:
        return None
    return texts or None


def _units_of(sources: dict[str, str]) -> dict[str, dict[str, str]]:
    return {
        name.removesuffix(".cu"): cuda_nvrtc.entries(text)
        for name, text in sources.items()
        if name.endswith(".cu")
    }


_loader = Loader()
