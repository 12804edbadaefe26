# SPDX-License-Identifier: Apache-2.0
"""A training step of a transformer on two gloo ranks: ZeRO 2 and 3 against torch's FSDP2, and another DeepSpeed.

    python benchmarks/zero_step.py [--rounds 6] [--layers 14] [--upstream PYTHON]

Every contender trains the same fp32 model with the same AdamW in two processes of one thread each. Contenders of one
interpreter take turns step by step, so that a machine that changes speed changes all of them; `--upstream` names an
interpreter with upstream's package, which runs the same steps right after.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

BATCH, SEQUENCE, WIDTH, HEADS = 2, 64, 768, 12


def model(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = [
        torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
        for _ in range(layers)
    ]
    return torch.nn.Sequential(*blocks, torch.nn.Linear(WIDTH, WIDTH))


def zero(net: torch.nn.Module, x: torch.Tensor, stage: int) -> Callable[[], None]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2**24, "overlap_comm": True},
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)

    def step() -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    return step


def fsdp(net: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    from torch.distributed.fsdp import fully_shard

    for block in net:
        fully_shard(block)
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(rank: int, args: argparse.Namespace) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(args.port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    net = model(args.layers)
    x = torch.randn(BATCH, SEQUENCE, WIDTH)
    rows: dict[str, Callable[[], None]] = {}
    if not args.only_zero:
        rows["FSDP2"] = fsdp(copy.deepcopy(net), x)
    for stage in (2, 3):
        rows[f"ZeRO-{stage}{args.label}"] = zero(copy.deepcopy(net), x, stage)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(args.rounds + 2):
        for name, step in rows.items():
            torch.distributed.barrier()
            begin = time.perf_counter()
            step()
            torch.distributed.barrier()
            if round_ >= 2:
                times[name].append(time.perf_counter() - begin)
    if rank == 0:
        Path(args.out).write_text(json.dumps(times), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--upstream")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--port", type=int, default=29611)
    parser.add_argument("--out")
    parser.add_argument("--label", default="")
    parser.add_argument("--only-zero", action="store_true")
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, args)
        return
    times = run(sys.executable, args, [])
    if args.upstream:
        args.port += 1
        times |= run(args.upstream, args, ["--only-zero", "--label", " upstream"])
    print(
        f"{sum(p.numel() for p in model(args.layers).parameters()) / 1e6:.0f} M parameters, 2 gloo ranks, {args.rounds} rounds"
    )
    print(f"{'':20s} {'ms a step':>10s} {'by FSDP2':>10s}")
    for name, values in times.items():
        ratio = statistics.median(values) / statistics.median(times["FSDP2"])
        print(f"{name:20s} {statistics.median(values) * 1e3:10.1f} {ratio:10.3f}")


def run(python: str, args: argparse.Namespace, extra: list[str]) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "times.json")
        command = [python, __file__, "--rounds", str(args.rounds), "--layers", str(args.layers)]
        command += ["--port", str(args.port), "--out", out, *extra]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(2)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit(f"{python} ended with {codes}")
        return json.loads(Path(out).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
