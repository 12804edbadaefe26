# SPDX-License-Identifier: Apache-2.0
"""Sequential reads and writes of one large file: ours beside fio, upstream's handle and a raw overlapped loop.

``python benchmarks/file_io.py [--folder DIR] [--size MiB] [--upstream PYTHON]`` prints one table. On Linux fio is the
yardstick (same engine, block size and depth), where it is installed; upstream's handle runs under the Python that
``--upstream`` names. On Windows the yardstick is a bare loop of ReadFile or WriteFile with a completion port. All
pass by the page cache. Rounds alternate between the programs, and the best of each counts: others use the disk too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
CHILD = """
import os, sys, time, torch
from deepspeed.ops.op_builder import AsyncIOBuilder
path, nbytes, block, depth, write = sys.argv[1], *map(int, sys.argv[2:])
handle = AsyncIOBuilder().load(verbose=False).aio_handle(block, depth, False, True, 1)
buffer = handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)).random_(0, 256)
start = time.perf_counter()
(handle.sync_pwrite if write else handle.sync_pread)(buffer, path)
print("SECONDS", time.perf_counter() - start, flush=True)
os._exit(0)  # some versions abort while they clean up
"""


class Ours:
    """One backend of this package, in this process."""

    def __init__(self, backend, args, plain=False):
        import torch

        from deepspeed.ops.aio import FileQueue, Options, locked_tensor

        self.name = f"deepspeed ({backend}{', pages of 4 KiB' if plain else ''})"
        self.queue = FileQueue(Options(args.block, args.depth), backend)
        nbytes = args.size * MIB
        if plain:
            self.buffer = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        else:
            self.buffer = locked_tensor(nbytes, torch.uint8)
        self.buffer.random_(0, 256)

    def seconds(self, write, path):
        submit = self.queue.submit_write if write else self.queue.submit_read
        start = time.perf_counter()
        self.queue.wait(submit(path, 0, self.buffer))
        return time.perf_counter() - start


class Fio:
    """The yardstick on Linux."""

    def __init__(self, engine, args):
        self.name, self.engine, self.args = f"fio ({engine})", engine, args

    def seconds(self, write, path):
        args = self.args
        job = {
            "name": "x",
            "filename": path,
            "rw": "write" if write else "read",
            "bs": args.block,
            "size": args.size * MIB,
            "iodepth": args.depth,
            "ioengine": self.engine,
            "direct": 1,
            "output-format": "json",
        }
        words = [f"--{key}={value}" for key, value in job.items()]
        done = subprocess.run(["fio", *words], capture_output=True, text=True, check=True)
        (result,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        return result["write" if write else "read"]["runtime"] / 1e3


class Child:
    """The same handle in another Python's deepspeed."""

    name = "upstream async_io (libaio)"

    def __init__(self, python, args):
        self.python, self.args = python, args

    def seconds(self, write, path):
        numbers = (self.args.size * MIB, self.args.block, self.args.depth, int(write))
        done = subprocess.run(
            [self.python, "-c", CHILD, path, *map(str, numbers)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(path).parent,
        )
        return float(done.stdout.split("SECONDS")[1].split()[0])


class Overlapped(ctypes.Structure):
    _fields_ = (
        ("internal", ctypes.c_void_p),
        ("internal_high", ctypes.c_void_p),
        ("offset", ctypes.c_uint32),
        ("offset_high", ctypes.c_uint32),
        ("event", ctypes.c_void_p),
    )


class RawLoop:
    """The yardstick on Windows: nothing between the loop and the system's calls."""

    name = "raw overlapped loop"

    def __init__(self, args):
        self.args = args
        self.api = ctypes.WinDLL("kernel32", use_last_error=True)
        self.api.CreateFileW.restype = ctypes.c_void_p
        self.api.CreateIoCompletionPort.restype = ctypes.c_void_p
        self.api.VirtualAlloc.restype = ctypes.c_void_p
        self.memory = self.api.VirtualAlloc(None, ctypes.c_size_t(args.size * MIB), 0x3000, 4)
        for start in range(0, args.size):
            ctypes.memmove(self.memory + start * MIB, os.urandom(MIB), MIB)

    def seconds(self, write, path):
        api, block, size = self.api, self.args.block, self.args.size * MIB
        unbuffered, overlapped = 0x20000000, 0x40000000
        start = time.perf_counter()
        access, how = (0x40000000, 4) if write else (0x80000000, 3)
        flags = unbuffered | overlapped
        file = ctypes.c_void_p(api.CreateFileW(path, access, 7, None, how, flags, None))
        port = ctypes.c_void_p(api.CreateIoCompletionPort(file, None, None, 1))
        slots = [Overlapped() for _ in range(self.args.depth)]
        addresses = {ctypes.addressof(slot): slot for slot in slots}
        call = api.WriteFile if write else api.ReadFile
        moved, key, at = ctypes.c_uint32(), ctypes.c_void_p(), ctypes.c_void_p()
        free, under_way, offset = list(slots), 0, 0
        while offset < size or under_way:
            while free and offset < size:
                slot = free.pop()
                slot.offset, slot.offset_high = offset & 0xFFFFFFFF, offset >> 32
                place = ctypes.c_void_p(self.memory + offset)
                if not call(file, place, block, None, ctypes.byref(slot)):
                    assert ctypes.get_last_error() == 997, ctypes.get_last_error()
                offset += block
                under_way += 1
            references = map(ctypes.byref, (moved, key, at))
            assert api.GetQueuedCompletionStatus(port, *references, 0xFFFFFFFF)
            free.append(addresses[at.value])
            under_way -= 1
        api.CloseHandle(file)
        api.CloseHandle(port)
        return time.perf_counter() - start


def contestants(args):
    from deepspeed.ops.aio import backends

    found = []
    if sys.platform == "win32":
        found.append(RawLoop(args))
    elif shutil.which("fio"):
        found += [Fio("io_uring", args), Fio("libaio", args)]
    found += [Ours(name, args) for name in backends() if name != "python"]
    if sys.platform == "linux":
        # Huge pages, which our buffers have, are half of the speed on some disks: fio's have none.
        found.append(Ours(backends()[0], args, plain=True))
    if args.upstream:
        found.append(Child(args.upstream, args))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where; default: temporary files")
    parser.add_argument("--size", type=int, default=1024, help="MiB")
    parser.add_argument("--block", type=int, default=MIB, help="bytes of a transfer")
    parser.add_argument("--depth", type=int, default=32, help="transfers under way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--upstream", default="", help="a Python with upstream's package")
    args = parser.parse_args()
    found = contestants(args)
    best = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # Everyone reads the same file, written by the first.
        kept = str(Path(folder) / "kept.bin")
        path = str(Path(folder) / "file.bin")
        found[0].seconds(True, kept)
        for _ in range(args.rounds):
            for who in found:
                for write in (True, False):
                    if write:
                        Path(path).unlink(missing_ok=True)
                    seconds = who.seconds(write, path if write else kept)
                    key = (who.name, write)
                    best[key] = min(seconds, best.get(key, seconds))
    yardstick = found[0].name
    print(f"{platform.platform()}, torch {__import__('torch').__version__}")
    print(
        f"{args.size} MiB, blocks of {args.block} bytes, depth {args.depth}, best of {args.rounds}"
    )
    print()
    print("| | write GB/s | read GB/s | write, of the first | read, of the first |")
    print("|---|---|---|---|---|")
    for who in found:
        speeds = [args.size * MIB / best[who.name, write] / 1e9 for write in (True, False)]
        ratios = [best[yardstick, write] / best[who.name, write] for write in (True, False)]
        cells = [f"{value:.2f}" for value in (*speeds, *ratios)]
        print(f"| {who.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
