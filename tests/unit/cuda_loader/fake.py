# SPDX-License-Identifier: Apache-2.0
"""The fake driver: compiles csrc/cuda and a stand-in for libcuda into one library that runs kernels on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deepspeed.ops import cuda_nvrtc
from deepspeed.ops.cuda import Loader, TorchSide
from deepspeed.ops.cuda_driver import Driver

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-pthread")
# a kernel's own misstep must be seen: undefined behaviour ends the process with a message
SANITIZE = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-static-libubsan")


def compiler():
    """Return the host compiler's path, or None; fibers need ucontext, which Windows lacks."""
    return None if sys.platform == "win32" else shutil.which("g++")


def build(folder=None):
    """Compile the fake driver, once for each state of the sources; returns the library's path."""
    paths = sorted([*SOURCE.glob("*.cu*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")])
    state = hashlib.sha256(b"".join(p.read_bytes() for p in paths) + repr(FLAGS).encode())
    folder = Path(folder or Path(tempfile.gettempdir()) / "ds_fake_driver")
    library = folder / f"{state.hexdigest()[:24]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        units = [HERE / "fake_driver.cpp"]
        table, declared = [], []
        for source in sorted(SOURCE.glob("*.cu")):
            unit = Path(work) / f"{source.stem}.cpp"
            lines = ['#include "cuda_words.h"', f'#include "{source}"']
            for name in cuda_nvrtc.entries(source.read_text(encoding="utf-8")):
                run = f"host_{name}"
                lines.append(f"void {run}(const void *b, size_t n) {{ Call<{name}>::run(b, n); }}")
                declared.append(f"void {run}(const void *, size_t);")
                table.append(f'    {{"{name}", {run}}},')
            unit.write_text("\n".join(lines) + "\n", encoding="utf-8")
            units.append(unit)
        last = Path(work) / "table.cpp"
        text = ['#include "cuda_words.h"', *declared, "extern const HostKernel host_kernels[];"]
        text += ["const HostKernel host_kernels[] = {", *table, "    {nullptr, nullptr},", "};"]
        last.write_text("\n".join(text) + "\n", encoding="utf-8")
        made = Path(work) / "fake.so"
        command = [compiler(), *FLAGS, *SANITIZE, f"-I{HERE}", "-o", made, *units, last]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        made.replace(library)
    return library


class FakeTorch(TorchSide):
    """CPU tensors pose as CUDA tensors of one device."""

    def __init__(self, device=0, stream=7):
        self.device, self.handle, self.graph, self.count = device, stream, False, 1

    def device_of(self, tensor):
        return self.device

    def stream(self, device):
        return self.handle

    def capturing(self):
        return self.graph

    def devices(self):
        return self.count


class Fake:
    """The fake driver of one test: its log, its switches, and a loader over it."""

    def __init__(self, library, pack_path):
        self.library = str(library)
        self.pack_path = pack_path
        self.dll = ctypes.CDLL(self.library)
        self.dll.fake_log.restype = ctypes.c_char_p
        self.dll.fake_context.restype = ctypes.c_size_t
        self.torch = FakeTorch()
        self.dll.fake_reset()

    def set(self, what, value):
        self.dll.fake_set(what.encode(), value)

    def fail(self, call, status):
        self.dll.fake_fail(call.encode(), status)

    def log(self):
        return self.dll.fake_log().decode().splitlines()

    def calls(self, name):
        return [line for line in self.log() if line.split(" ")[0] == name]

    def driver(self):
        return Driver(self.library)

    def loader(self, pack_path=None):
        return Loader(self.torch, self.driver, pack_path or self.pack_path)
