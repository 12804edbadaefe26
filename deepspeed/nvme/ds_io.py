# SPDX-License-Identifier: Apache-2.0
"""``ds_io``: the speed of reading or writing a folder's disk, by one process or several."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from deepspeed.nvme.measure import ENGINES, Job, measure, size_of
from deepspeed.utils.errors import explain

_BARRIER_SECONDS = 600


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(prog="ds_io", description=__doc__)
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--folder", default=None, help="folder for the files, which are removed at the end")
    add("--folder_to_device_mapping", nargs="+", help="folder:device, one a process")
    add("--io_size", required=True, help="bytes that each process moves, such as 400M")
    add("--fast_io_size", default="64M", help="buffer of engine torch_fastio")
    add("--read", **flag, help="measure reading; writing is measured otherwise")
    add("--multi_process", type=int, default=1, help="processes, each with a file of its own")
    add("--block_size", default="1M", help="bytes of one transfer")
    add("--queue_depth", type=int, default=32, help="transfers under way")
    add("--single_submit", **flag, help="tell the system of each transfer by itself")
    add("--sequential_requests", **flag, help="one request a file, not several at once")
    add("--validate", **flag, help="compare file and memory")
    add("--engine", choices=ENGINES, default="aio_handle", help="who moves the bytes")
    add("--loops", type=int, default=3, help="measured rounds")
    add("--io_parallel", type=int, default=None, help="threads that share a request")
    add("--gpu", **flag, help="move memory of a GPU")
    add("--use_gds", **flag, help="GPUDirect Storage (not supported)")
    add(
        "--slow_bounce_buffer",
        **flag,
        help="no effect: GPU memory passes through page-locked memory",
    )
    add("--torch_legacy_save", **flag, help="older format of torch.save")
    add("--use_accelerator_pin_memory", **flag, help="page-lock by the accelerator")
    add("--warmup_loops", type=int, default=1, help="rounds before those that count")
    add("--include_warmup_time", **flag, help="count them too")
    add("--different_file_each_iteration", **flag, help="a new file each round")
    return parser


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return what each process does.

    Raises:
        ValueError: options that contradict each other or this machine.
    """
    if options.use_gds:
        raise ValueError(explain("GPUDirect Storage is not supported", fix="Leave --use_gds out."))
    if options.gpu and not torch.cuda.is_available():
        raise ValueError(explain("--gpu needs a CUDA device, and there is none"))
    count = options.multi_process
    if count < 1 or options.loops < 1 or options.warmup_loops < 0:
        raise ValueError("--multi_process and --loops must be positive")
    places = [(options.folder, None)] * count
    if options.folder_to_device_mapping:
        pairs = [entry.rpartition(":") for entry in options.folder_to_device_mapping]
        places = [(folder, int(device)) for folder, _, device in pairs if device.isdigit()]
        if len(places) != len(pairs):
            raise ValueError(explain("bad --folder_to_device_mapping", expected="folder:device"))
    elif options.folder is None:
        raise ValueError("give --folder or --folder_to_device_mapping")
    job = Job(
        folder=Path(),
        nbytes=size_of(options.io_size),
        read=options.read,
        engine=options.engine,
        block_size=size_of(options.block_size),
        queue_depth=options.queue_depth,
        single_submit=options.single_submit,
        intra_op_parallelism=options.io_parallel or 1,
        loops=options.loops,
        warmup=options.warmup_loops,
        validate=options.validate,
        new_file_each_loop=options.different_file_each_iteration,
        pin_by_accelerator=options.use_accelerator_pin_memory,
        requests=1 if options.sequential_requests else options.io_parallel or 1,
        legacy_save=options.torch_legacy_save,
        fast_size=size_of(options.fast_io_size),
    )
    jobs = []
    for rank, (folder, device) in enumerate(places):
        path = Path(folder).resolve()
        path.mkdir(parents=True, exist_ok=True)
        where = f"cuda:{rank if device is None else device}" if options.gpu else "cpu"
        jobs.append(replace(job, folder=path, device=where, name=f"ds_io_{rank}"))
    return jobs


def run(jobs: list[Job]) -> list[list[float]]:
    """Run the jobs side by side, each round begun together; returns the seconds of each job's rounds.

    Raises:
        RuntimeError: a process failed; the message holds its words.
    """
    if len(jobs) == 1:
        return [measure(jobs[0])]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(jobs))
    ends = [context.Pipe(duplex=False) for _ in jobs]
    children = [
        context.Process(target=_child, args=(job, barrier, sender))
        for job, (_, sender) in zip(jobs, ends, strict=True)
    ]
    for child in children:
        child.start()
    results = []
    for child, (receiver, sender) in zip(children, ends, strict=True):
        sender.close()
        try:
            results.append(receiver.recv())
        except EOFError:
            results.append("a process ended without a result")
        child.join()
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        raise RuntimeError(failures[0])
    return results


def _child(job: Job, barrier: Barrier, result: Connection) -> None:
    try:
        result.send(measure(job, lambda: barrier.wait(_BARRIER_SECONDS)))
    except Exception as error:
        barrier.abort()  # the others must not wait for this one
        result.send(f"{type(error).__name__}: {error}")


def report(jobs: list[Job], seconds: list[list[float]], count_warmup: bool) -> str:
    """Return the table: a row a round, with the speed of all processes together; and the mean."""
    job = jobs[0]
    verb = "read" if job.read else "write"
    total = sum(one.nbytes for one in jobs)
    lines = [
        f"{verb} {job.nbytes} bytes x {len(jobs)} process(es), engine {job.engine}, block "
        f"{job.block_size}, depth {job.queue_depth}, threads {job.intra_op_parallelism}",
        f"{'round':<10}{'seconds':>10}{'GB/s':>10}",
    ]
    counted = []
    for i, times in enumerate(zip(*seconds, strict=True)):
        warmup = i < job.warmup
        slowest = max(times)
        name = f"warmup {i}" if warmup else str(i - job.warmup)
        lines.append(f"{name:<10}{slowest:>10.3f}{total / slowest / 1e9:>10.2f}")
        if count_warmup or not warmup:
            counted.append(slowest)
    mean = sum(counted) / len(counted)
    lines.append(f"{'mean':<10}{mean:>10.3f}{total / mean / 1e9:>10.2f}")
    return "\n".join(lines)


def ds_io_main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after one line of error."""
    options = build_parser().parse_args(args)
    try:
        jobs = jobs_of(options)
        print(report(jobs, run(jobs), options.include_warmup_time))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"ds_io: {error}", file=sys.stderr)
        return 1
    return 0
