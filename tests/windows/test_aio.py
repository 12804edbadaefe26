# SPDX-License-Identifier: Apache-2.0
"""File I/O of the installed package under Windows: completion ports, and the two disk tools."""

from __future__ import annotations

import json

ROUND_TRIP = """
import os, sys, torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.aio import FileQueue, Options, backends
assert backends()[0] == "iocp", backends()
handle = AsyncIOBuilder().load().aio_handle(1 << 16, 8, False, True, 2)
path = os.path.join(sys.argv[1], "grüße 文件.bin")
sent = torch.randint(0, 256, (3_000_001,), dtype=torch.uint8)
assert handle.sync_pwrite(sent, path, 77) == 1
with open(path, "rb") as file:
    assert file.read() == bytes(77) + sent.numpy().tobytes()
rooms = [handle.new_cpu_locked_tensor(1000, torch.empty(0)) for _ in range(100)]
for i, room in enumerate(rooms):
    handle.async_pread(room, path, 77 + 4000 * i)
assert handle.wait() == 100
assert torch.equal(torch.cat(rooms).view(torch.uint8), sent[:400_000])
deep = os.path.join(sys.argv[1], *(["a folder of thirty characters.."[:30]] * 9))
os.makedirs("\\\\\\\\?\\\\" + os.path.abspath(deep))
handle.sync_pwrite(sent, os.path.join(deep, "long.bin"))
print(FileQueue(backend="iocp").backend, "fine")
"""


def test_completion_ports_move_every_byte(windows, folder):
    done = windows.python("-c", ROUND_TRIP, str(folder))
    assert done.returncode == 0 and "iocp fine" in done.stdout, done.stdout


def test_the_tests_of_file_io_pass(windows):
    words = ["-q", "-x", "-p", "no:cacheprovider", "-o", "pythonpath=", "tests/unit/aio"]
    done = windows.python("-m", "pytest", *words, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]


def test_ds_io_and_ds_nvme_tune_run(windows, folder):
    done = windows.run("ds_io", "--folder", ".", "--io_size", "1M", "--loops", "1", cwd=folder)
    assert done.returncode == 0 and "mean" in done.stdout, done.stdout
    (folder / "sweep.json").write_text(
        json.dumps({"block_size": ["64K"], "queue_depth": [4], "io_parallel": [1]}),
        encoding="utf-8",
    )
    words = ("--nvme_dir", ".", "--io_size", "1M", "--sweep_config", "sweep.json")
    done = windows.run("ds_nvme_tune", *words, cwd=folder)
    assert done.returncode == 0, done.stdout
    section = json.loads(done.stdout[done.stdout.index("{") :])
    assert section["aio"]["block_size"] == 65536
    assert (folder / "_aio_bench_logs" / "results.png").stat().st_size > 0
