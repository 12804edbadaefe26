# SPDX-License-Identifier: Apache-2.0
"""Export of a large ZeRO checkpoint to fp32 weights: seconds, and the most memory that it holds at once.

``python benchmarks/export.py [--folder DIR] [--params N] [--shard SIZE]`` makes a stage 2 and a stage 3 checkpoint of two
ranks (zeros: their pages cost nothing to make), exports each in a process of its own, and prints one table. Peak memory is
what the system counts as resident, mapped files included, and is compared with the largest file written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
LAYER = 4096
CHILD = """
import sys, time, psutil
from deepspeed.utils.zero_to_fp32 import main
before = psutil.Process().memory_info().rss
start = time.perf_counter()
main(sys.argv[1:])
seconds = time.perf_counter() - start
if sys.platform == "win32":
    peak = psutil.Process().memory_info().peak_wset
else:
    lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print("RESULT", seconds, before, peak)
"""


def sparse(folder: Path, numel: int) -> torch.Tensor:
    """A tensor of zeros that lies in a file without blocks."""
    path = folder / f"zeros_{numel}"
    with open(path, "wb") as file:
        file.truncate(4 * numel)
    return torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)


def make(folder: Path, stage: int, params: int) -> None:
    """Write a checkpoint of two ranks whose masters are zeros."""
    tag = folder / "t"
    tag.mkdir(parents=True)
    count = max(2, -(-params // LAYER**2 // 2) * 2)
    shapes = OrderedDict((f"layer{i}.weight", torch.Size((LAYER, LAYER))) for i in range(count))
    flat = sparse(folder, count * LAYER**2 // 2)
    for rank in range(2):
        model: dict[str, Any] = {
            "module": OrderedDict(),
            "buffer_names": [],
            "param_shapes": [shapes],
            "shared_params": {},
        }
        state: dict[str, Any] = {"zero_stage": stage, "partition_count": 2}
        if stage == 3:
            torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            state["fp32_flat_groups"] = [flat]
        else:
            state |= {"single_partition_of_fp32_groups": [flat], "group_paddings": [0]}
            if rank == 0:
                torch.save(model, tag / "mp_rank_00_model_states.pt")
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, tag / name)
    (folder / "latest").write_text("t", encoding="utf-8")


def export(folder: Path, options: list[str]) -> str:
    """Export in a process of its own; returns a row of the table."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(folder), target, *options],
            capture_output=True,
            encoding="utf-8",
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        files = [p for p in Path(target).iterdir() if p.suffix in (".bin", ".safetensors")]
        largest, total = max(p.stat().st_size for p in files), sum(p.stat().st_size for p in files)
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    seconds, before, peak = map(float, result.split()[1:])
    return (
        f"| {total / 4e9:.2f} B | {len(files)} x {largest / GIB:.2f} GiB | {seconds:.1f} | "
        f"{total / seconds / 1e9:.2f} | {before / GIB:.2f} | {peak / GIB:.2f} | {peak / largest:.2f} |"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the export of a large checkpoint.")
    parser.add_argument("--folder", default=None, help="where files go (default: temporary)")
    parser.add_argument("--params", type=int, default=1_000_000_000, help="about how many")
    parser.add_argument("--shard", default="2GB", help="most bytes of an output file")
    options = parser.parse_args()
    print(
        "| stage, format | parameters | files | seconds | GB/s | GiB at start | GiB at most | of the largest file |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for stage in (2, 3):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            make(Path(folder), stage, options.params)
            for kind in (["--safe_serialization"], []):
                row = export(Path(folder), ["--max_shard_size", options.shard, *kind])
                name = "safetensors" if kind else "torch"
                print(f"| {stage}, {name} {row}", flush=True)


if __name__ == "__main__":
    main()
