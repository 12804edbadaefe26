# SPDX-License-Identifier: Apache-2.0
"""Reduce-scatter on gloo: our byte exchange against torch's own verb, two ranks of one thread.

    python benchmarks/gloo_reduce_scatter.py

Prints, for each dtype and size, the best of several rounds of both (the rounds alternate) and their ratio.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from tests.helpers.ranks import RankPool

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 7


def timed(repeats, verb, *args):
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        verb(*args)
    return (time.perf_counter() - start) / repeats


def rows(rank):
    axis = Axis.of_group(None)
    native = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    found = []
    for dtype in DTYPES:
        for size in SIZES:
            full, shard = torch.ones(size, dtype=dtype), torch.empty(size // 2, dtype=dtype)
            repeats = max(3, min(50, (1 << 22) // size))
            best = {}
            for _ in range(ROUNDS):
                ours = timed(repeats, flat.reduce_scatter_into, shard, full, axis)
                theirs = timed(repeats, native, shard, full)
                best["ours"] = min(best.get("ours", ours), ours)
                best["torch"] = min(best.get("torch", theirs), theirs)
            found.append((str(dtype).removeprefix("torch."), size, best["ours"], best["torch"]))
    return found


def main():
    with RankPool(2) as pool:
        table = pool.run(rows, timeout=300)[0]
    print(f"torch {torch.__version__}, 2 ranks, 1 thread each")
    print(f"{'dtype':>9}{'elements':>10}{'ours ms':>10}{'torch ms':>10}{'ratio':>7}")
    for dtype, size, ours, theirs in table:
        print(f"{dtype:>9}{size:>10}{ours * 1e3:>10.3f}{theirs * 1e3:>10.3f}{theirs / ours:>7.2f}")


if __name__ == "__main__":
    main()
