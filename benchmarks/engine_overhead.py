# SPDX-License-Identifier: Apache-2.0
"""What the engine adds to a training step: the plain torch loop and ZeRO 0, 1, 2 in turn, in one process and one run.

    python benchmarks/engine_overhead.py [--rounds 15]

All rows drive the same `torch.optim.AdamW` on copies of the same fp32 model. A row's ratio is the median over rounds of
its step time by the plain loop's in the same round, so a machine that changes speed does not change it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

import deepspeed

Step = Callable[[], None]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = [
        torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        for _ in range(4)
    ]
    return torch.nn.Sequential(*blocks, torch.nn.Linear(256, 256))


def plain(net: torch.nn.Module, x: torch.Tensor) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def step() -> None:
        loss = net(x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine(net: torch.nn.Module, x: torch.Tensor, stage: int) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    config = {
        "train_micro_batch_size_per_gpu": x.shape[0],
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }
    wrapped, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)

    def step() -> None:
        wrapped.backward(wrapped(x).square().mean())
        wrapped.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    net, x = model(), torch.randn(4, 64, 256)
    rows = {"plain torch": plain(copy.deepcopy(net), x)}
    rows |= {f"stage {stage}": engine(copy.deepcopy(net), x, stage) for stage in (0, 1, 2)}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_ in range(rounds + 3):
        for name, step in rows.items():
            begin = time.perf_counter()
            step()
            if round_ >= 3:
                times[name].append(time.perf_counter() - begin)
    print(
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    print(f"{'':12s} {'ms a step':>10s} {'by plain torch':>15s}")
    for name, values in times.items():
        ratio = statistics.median(v / p for v, p in zip(values, times["plain torch"], strict=True))
        print(f"{name:12s} {statistics.median(values) * 1e3:10.2f} {ratio:15.3f}")


if __name__ == "__main__":
    main()
