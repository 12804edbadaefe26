# SPDX-License-Identifier: Apache-2.0
"""Saving and loading an engine's state, against the bare disk and torch; and training beside a save.

    python benchmarks/checkpoint.py [--folder DIR] [--layers 10] [--rounds 5] [--steps 1]

One rank, ZeRO 2, bf16 with fp32 masters and moments. All contenders move the same bytes; they take turns, because others
use the disk too, and medians of ratios within a round count. `raw` is a plain loop of large writes past the page cache
(where the system has such writes) from aligned memory, with a flush at the end. torch.save is flushed to the disk too:
what a crash would take back is not saved. Beside a save there are as many steps as it takes until it is published (at
least `--steps`, none if 0), and as many again without one. `cold` means that the files were dropped from the page cache (Linux).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH, HEADS, BATCH, SEQUENCE = 768, 12, 2, 128
PIECE = 8 << 20


def build(layers: int, decoupled: bool) -> Any:
    import deepspeed

    torch.manual_seed(0)
    blocks = [
        torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
        for _ in range(layers)
    ]
    net = torch.nn.Sequential(*blocks, torch.nn.Linear(WIDTH, WIDTH))
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    if decoupled:
        config["checkpoint"] = {"writer": {"decoupled": True}}
    engine = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
    step(engine)
    return engine


def step(engine: Any) -> None:
    x = torch.ones(BATCH, SEQUENCE, WIDTH, dtype=torch.bfloat16)
    engine.backward(engine(x).float().square().mean())
    engine.step()


def seconds(action: Callable[[], object]) -> float:
    return both_seconds(action)[0]


def both_seconds(action: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of this process's time on a CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - cpu


def flush(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def raw_write(path: Path, source: torch.Tensor) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    flags |= getattr(os, "O_DIRECT", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    try:
        view = memoryview(source.numpy())
        for begin in range(0, len(view), PIECE):
            os.write(handle, view[begin : begin + PIECE])
        os.fsync(handle)
    finally:
        os.close(handle)


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*.pt"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def torch_save(contents: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    for name, content in contents.items():
        torch.save(content, folder / name)
        flush(folder / name)


def torch_load(folder: Path) -> list[Any]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


def saves_and_loads(folder: Path, layers: int, rounds: int) -> list[tuple[str, ...]]:
    from deepspeed.ops.aio.buffers import aligned_tensor
    from deepspeed.runtime.engine_checkpoint import _files_of_rank

    torch.set_num_threads(1)  # or copies wait for a thread that other work keeps from running
    engine = build(layers, decoupled=False)
    contents = _files_of_rank(engine, {}, False, [])
    engine.save_checkpoint(folder / "size", tag="t")
    nbytes = sum(path.stat().st_size for path in (folder / "size").rglob("*.pt"))
    source = aligned_tensor(nbytes // PIECE * PIECE + PIECE, torch.uint8).random_(0, 256)[:nbytes]
    whole = source[: nbytes // PIECE * PIECE]
    scale = nbytes / whole.numel()
    times: dict[str, list[float]] = {}
    work: dict[str, list[float]] = {}

    def note(name: str, action: Callable[[], object], scale: float = 1.0) -> None:
        passed, busy = both_seconds(action)
        times.setdefault(name, []).append(passed * scale)
        work.setdefault(name, []).append(busy * scale)

    for _ in range(rounds):
        shutil.rmtree(folder / "ours", ignore_errors=True)
        shutil.rmtree(folder / "torch", ignore_errors=True)
        (folder / "raw").unlink(missing_ok=True)
        note("raw write", lambda: raw_write(folder / "raw", whole), scale)
        note("save_checkpoint", lambda: engine.save_checkpoint(folder / "ours", tag="t"))
        note("torch.save", lambda: torch_save(contents, folder / "torch"))
        for kind in ("cold", "warm"):
            if kind == "cold":
                if not hasattr(os, "posix_fadvise"):
                    continue
                forget(folder)
            note(f"torch.load, {kind}", lambda: torch_load(folder / "torch"))
            note(f"load_checkpoint, {kind}", lambda: engine.load_checkpoint(folder / "ours"))
    engine.destroy()
    rows = [("state", f"{nbytes / 1e9:.2f} GB", "", "")]

    def ratio(name: str, against: str) -> str:
        pairs = zip(times[against], times[name], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f} of {against}"

    for name, values in times.items():
        against = f"torch.load, {name.split(', ')[1]}" if ", " in name else "raw write"
        speed, busy = nbytes / 1e9 / statistics.median(values), statistics.median(work[name])
        rows.append((name, f"{speed:.2f} GB/s", f"{busy:.2f} s", ratio(name, against)))
    rows.append(("save_checkpoint", "", "", ratio("save_checkpoint", "torch.save")))
    return rows


def beside(folder: Path, layers: int, rounds: int, steps: int) -> list[tuple[str, ...]]:
    torch.set_num_threads(os.cpu_count() or 1)
    engine = build(layers, decoupled=True)
    keeper = engine.checkpoint_engine
    engine.save_checkpoint(folder / "beside", tag="first")  # takes the memory of the copy
    keeper.finish()

    def begin() -> None:
        engine.save_checkpoint(folder / "beside", tag="again")

    calls, longer, counts, ratios = [], [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        calls.append(seconds(begin))
        count = 0
        while count < steps or keeper.is_busy:
            step(engine)
            count += 1
        saving = time.perf_counter() - start
        plain = seconds(lambda n=count: [step(engine) for _ in range(n)])
        counts.append(count)
        longer.append(saving - plain)
        ratios.append(saving / plain)
    engine.destroy()
    name = f"{statistics.median(counts)} steps, a save beside until it is published"
    return [
        (name, f"{statistics.median(longer):+.3f} s", "", f"{statistics.median(ratios) - 1:+.1%}"),
        ("of it the call of save_checkpoint", f"{statistics.median(calls):.3f} s", "", ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.system()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        print("\n| | | CPU | |\n|---|---|---|---|")
        show(saves_and_loads(folder, args.layers, args.rounds))
        if args.steps:
            show(beside(folder, args.layers, args.rounds, args.steps))


def show(rows: list[tuple[str, ...]]) -> None:
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
