# SPDX-License-Identifier: Apache-2.0
"""Resident bytes of a training step against the memory plan: stages 0 to 3, offloaded or not, on one and two CPU ranks.

    python benchmarks/zero_memory.py [--params 300M] [--cells stage2,stage3-nvme] [--ranks 1,2] [--json FILE]

Each cell trains the same model of linear layers; its batch is tiny, so that activations do not count. What the process
holds beyond its libraries is compared with the plan that `ds_report --plan` prints: during the steps (peak) and between
them (lasting). Cells of one number of ranks take turns in the same processes. Linux only: the peak is the kernel's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

WIDTH = 1024
CPU, NVME = {"device": "cpu"}, {"device": "nvme"}
# Nothing of the model stays whole, and states are stepped in eight parts or so.
SMALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
CELLS: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage3-small": {"stage": 3, **SMALL},
    "stage2-cpu": {"stage": 2, "offload_optimizer": CPU},
    "stage2-zenflow": {
        "stage": 2,
        "offload_optimizer": CPU,
        "zenflow": {"topk_ratio": 0.05, "update_interval": 2, "overlap_step": True},
    },
    "stage3-super": {"stage": 3, "offload_optimizer": {**CPU, "super_offload": True}, **SMALL},
    "stage3-nvme-states": {"stage": 3, "offload_optimizer": NVME, **SMALL},
    "stage3-nvme": {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME, **SMALL},
}


def model(numel: int) -> torch.nn.Module:
    """Blocks of two linear layers, about `numel` parameters together."""
    torch.manual_seed(0)
    block = 8 * WIDTH * WIDTH
    layers: list[torch.nn.Module] = []
    for _ in range(max(1, round(numel / block))):
        layers += [
            torch.nn.Linear(WIDTH, 4 * WIDTH),
            torch.nn.ReLU(),
            torch.nn.Linear(4 * WIDTH, WIDTH),
        ]
    return torch.nn.Sequential(*layers)


def resident(key: str = "VmRSS") -> int:
    """Bytes of memory that the process holds (VmRSS), or held at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def settle() -> None:
    """Give freed memory back to the system, as far as the C library can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def train(cell: dict[str, Any], args: argparse.Namespace, numel: int, ranks: int) -> dict[str, Any]:
    import deepspeed
    from deepspeed.runtime.memory_plan import plan_for
    from deepspeed.runtime.zero.estimate import ModelSize

    settle()
    before = resident()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        net = model(numel).to(dtype)
        size = ModelSize.of_module(net)
        zero = {"reduce_bucket_size": 2**23, "sub_group_size": size.numel // ranks // 8, **cell}
        for section in ("offload_optimizer", "offload_param"):
            if section in zero and zero[section] is NVME:
                zero[section] = {**NVME, "nvme_path": folder}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "bf16": {"enabled": args.dtype == "bf16"},
            "zero_optimization": zero,
        }
        engine, *_ = deepspeed.initialize(model=net, config=config)
        plan = plan_for(engine._config, size, ranks, device_is_host=True)
        x = torch.randn(4, WIDTH, dtype=dtype)
        peaks, lasting = [], 0
        for _ in range(3):
            settle()
            forget_peak()
            engine.backward(engine(x).float().square().mean())
            engine.step()
            peaks.append(resident("VmHWM") - before)
            settle()
            lasting = resident() - before
        engine.destroy()
    return {
        "params": size.numel,
        "peak": max(peaks),
        "peaks": peaks,
        "planned peak": plan.peak("host"),
        "lasting": lasting,
        "planned lasting": plan.lasting("host"),
        "table": str(plan),
    }


def work(args: argparse.Namespace) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    first = {"stage": 2, "offload_optimizer": NVME}
    train(first, args, 1, ranks)
    train(CELLS["stage3-nvme"], args, 1, ranks)
    rows = {}
    for name in args.cells:
        rows[name] = train(CELLS[name], args, args.params, ranks)
        shown = [
            f"{key} {value >> 20}" for key, value in rows[name].items() if isinstance(value, int)
        ]
        print(
            os.environ["RANK"],
            name,
            *shown,
            [peak >> 20 for peak in rows[name]["peaks"]],
            flush=True,
        )
    Path(f"{args.out}.{os.environ['RANK']}").write_text(json.dumps(rows), encoding="utf-8")


def launch(args: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    """Run the cells on `ranks` processes; each one's rows."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "rows")
        command = [sys.executable, str(Path(__file__).resolve()), "--out", out]
        command += ["--params", str(args.params), "--dtype", args.dtype, "--folder", args.folder]
        command += ["--cells", ",".join(args.cells)]
        processes = []
        for rank in range(ranks):
            joined = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(args.port),
                "DS_ACCELERATOR": "cpu",
            }
            processes.append(subprocess.Popen(command, env={**os.environ, **joined}))
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"ranks ended with {codes}")
        return [
            json.loads(Path(f"{out}.{rank}").read_text(encoding="utf-8")) for rank in range(ranks)
        ]


def number(text: str) -> int:
    return round(float(text.rstrip("M")) * (1e6 if text.endswith("M") else 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=number, default=number("300M"))
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(CELLS))
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where NVMe files go")
    parser.add_argument("--json", help="write the rows there, too")
    parser.add_argument("--tables", action="store_true", help="print each plan")
    parser.add_argument("--port", type=int, default=29655)
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.out is not None:
        work(args)
        return
    rows = {}
    for ranks in args.ranks:
        for name, row in launch(args, ranks)[0].items():
            rows[f"{name}, {ranks} rank{'s' * (ranks > 1)}"] = row
    if args.json:
        Path(args.json).write_text(json.dumps(rows), encoding="utf-8")
    print(
        f"{args.params / 1e6:.0f} M parameters in {args.dtype}; MB on each rank, beyond the libraries"
    )
    print(
        f"{'':30s}{'peak':>8s}{'planned':>9s}{'ratio':>7s}{'lasting':>9s}{'planned':>9s}{'ratio':>7s}"
    )
    for name, row in rows.items():
        cells = []
        for key in ("peak", "lasting"):
            got, want = row[key], row[f"planned {key}"]
            cells.append(f"{got / 2**20:8.0f}{want / 2**20:9.0f}{got / max(1, want):7.2f}")
        print(f"{name:30s}{' '.join(cells)}")
        if args.tables:
            print(row["table"])


if __name__ == "__main__":
    main()
