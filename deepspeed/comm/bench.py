# SPDX-License-Identifier: Apache-2.0
"""``ds_bench``: how long collectives take by message size, and the bandwidth that this amounts to."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import env
from deepspeed.utils.comms_logging import calc_bw_log, convert_size
from deepspeed.utils.errors import explain

from . import comm

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "pt2pt")
SMALLEST = 10  # elements, as a power of two
SECONDS_PER_SIZE = 2.0


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        op: the collective.
        size: bytes of the message; of the whole result for a gather, of the whole input for a scatter.
        time_ms: milliseconds a call, on the slowest rank.
        algbw: size by time, in Gbit/s.
        busbw: traffic of the busiest link by time, in Gbit/s: what to compare with the hardware's.
    """

    op: str
    size: int
    time_ms: float
    algbw: float
    busbw: float


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="ds_bench",
        description="Measure collectives over the ranks of a job; without one, start it here.",
    )
    add = parser.add_argument
    for op in OPS:
        add(f"--{op.replace('_', '-')}", dest=op, action="store_true", help=f"measure {op}")
    add("--scan", action="store_true", help="all sizes up to the largest, in powers of two")
    add("--maxsize", type=int, default=24, help="largest message: 2**MAXSIZE elements (24)")
    add("--trials", type=int, default=50, help="timed calls of each size, at most (50)")
    add("--warmups", type=int, default=5, help="calls before (5)")
    add("--dtype", default="float", help="torch's name of the elements' type (float)")
    add("--bw-unit", choices=["Gbps", "GBps"], default="Gbps", help="bits or bytes per second")
    add("--async-op", action="store_true", help="launch asynchronously, and wait")
    add("--raw", action="store_true", help="rows of plain numbers: op, bytes, ms, bandwidths")
    add("--backend", default=None, help="gloo or nccl; without it the accelerator's")
    add("--json", type=Path, default=None, help="write the rows to this file too")
    add("-n", "--ranks", type=int, default=2, help="ranks to start here, without a launcher (2)")
    add("-H", "--hostfile", default=None, help="nodes to start ranks on, without a launcher")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _call(op: str, elements: int, dtype: torch.dtype, async_op: bool) -> Callable[[], None]:
    """Return one call of a collective on buffers of its own."""
    world, rank = comm.get_world_size(), comm.get_rank()
    device = get_accelerator().current_device_name()
    whole = torch.ones(elements, dtype=dtype, device=device)
    part = torch.ones(elements // world, dtype=dtype, device=device)

    def work() -> object:
        if op == "all_reduce":
            return comm.all_reduce(whole, async_op=async_op)
        if op == "all_gather":
            return comm.all_gather_into_tensor(whole, part, async_op=async_op)
        if op == "reduce_scatter":
            return comm.reduce_scatter_tensor(part, whole, async_op=async_op)
        if op == "all_to_all":
            return comm.all_to_all_single(other, whole, async_op=async_op)
        if op == "broadcast":
            return comm.broadcast(whole, 0, async_op=async_op)
        if rank == 0:
            comm.send(whole, world - 1)
        elif rank == world - 1:
            comm.recv(whole, 0)
        return None

    other = torch.empty_like(whole) if op == "all_to_all" else whole

    def call() -> None:
        handle = work()
        if async_op and handle is not None:
            handle.wait()  # type: ignore[attr-defined]

    return call


def _slowest(seconds: float) -> float:
    """Return the largest of the ranks' values."""
    value = torch.tensor(
        [seconds], dtype=torch.float64, device=get_accelerator().current_device_name()
    )
    comm.all_reduce(value, op=comm.ReduceOp.MAX)
    return value.item()


def measure(op: str, elements: int, dtype: torch.dtype, options: argparse.Namespace) -> Row:
    """Measure one collective at one size. Collective.

    Args:
        op: one of `OPS`.
        elements: elements of the message; a multiple of the ranks.
        dtype: their type.
        options: trials, warmups, async_op.
    """
    call, synchronize = (
        _call(op, elements, dtype, options.async_op),
        get_accelerator().synchronize,
    )
    start = time.perf_counter()
    for _ in range(max(1, options.warmups)):
        call()
    synchronize()
    one = _slowest((time.perf_counter() - start) / max(1, options.warmups))
    trials = max(1, min(options.trials, int(SECONDS_PER_SIZE / max(one, 1e-9))))
    comm.barrier()
    synchronize()
    start = time.perf_counter()
    for _ in range(trials):
        call()
    synchronize()
    seconds = _slowest((time.perf_counter() - start) / trials)
    size = elements * dtype.itemsize
    algbw, busbw = calc_bw_log(op, size, seconds, comm.get_world_size())
    return Row(op, size, seconds * 1e3, algbw, busbw)


def sizes(options: argparse.Namespace, world: int) -> Iterator[int]:
    """Yield numbers of elements, each a multiple of the ranks."""
    first = min(SMALLEST, options.maxsize) if options.scan else options.maxsize
    for power in range(first, options.maxsize + 1):
        yield max(1, 2**power // world) * world


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            explain("no such type of elements", got=f"--dtype {name}", expected="such as bfloat16")
        )
    return found


def _say(row: Row, options: argparse.Namespace) -> str:
    unit = 8.0 if options.bw_unit == "GBps" else 1.0
    if options.raw:
        return (
            f"{row.op} {row.size} {row.time_ms:.6f} {row.algbw / unit:.6f} {row.busbw / unit:.6f}"
        )
    return (
        f"{row.op:<16}{convert_size(row.size):>12}{row.time_ms:>14.3f}"
        f"{row.algbw / unit:>14.3f}{row.busbw / unit:>14.3f}"
    )


def bench(options: argparse.Namespace) -> list[Row]:
    """Join the job, measure what was asked for, print the table on rank 0. Collective.

    Raises:
        ValueError: the options are not usable.
    """
    dtype = _dtype(options.dtype)
    if not 0 <= options.maxsize <= 40 or options.trials < 1:
        raise ValueError(
            explain(
                "sizes or trials that cannot be",
                got=f"--maxsize {options.maxsize} --trials {options.trials}",
                expected="maxsize 0 to 40, trials 1 or more",
            )
        )
    comm.init_distributed(options.backend, verbose=False)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(comm.get_local_rank())
    world, rows = comm.get_world_size(), []
    first = comm.get_rank() == 0
    if first and not options.raw:
        unit = options.bw_unit
        print(f"{world} ranks, {comm.get_backend()}, {dtype}")
        print(f"{'op':<16}{'size':>12}{'time ms':>14}{f'algbw {unit}':>14}{f'busbw {unit}':>14}")
    for op in [op for op in OPS if getattr(options, op)] or OPS:
        if op == "pt2pt" and world < 2:
            continue
        for elements in sizes(options, world):
            rows.append(measure(op, elements, dtype, options))
            if first:
                print(_say(rows[-1], options), flush=True)
    if first and options.json is not None:
        told = {"world_size": world, "dtype": str(dtype), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    comm.barrier()
    comm.destroy_process_group()
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Measure as one rank of a job; outside of one, start a job of ourselves first."""
    words = list(sys.argv[1:] if args is None else args)
    options = build_parser().parse_args(words)
    if not env.RANK.is_set() and not env.OMPI_RANK.is_set() and not env.SLURM_PROCID.is_set():
        from deepspeed.launcher import runner

        where = ["--num_gpus", str(options.ranks)]
        if options.hostfile is not None:
            where = ["--hostfile", options.hostfile]
        job = [*where, "--log_level", "warning", "--module", "deepspeed.comm.bench", *words]
        return runner.run_told_clearly(job, "ds_bench")
    try:
        bench(options)
    except ValueError as error:
        print(f"ds_bench: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
