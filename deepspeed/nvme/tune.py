# SPDX-License-Identifier: Apache-2.0
"""``ds_nvme_tune``: try I/O settings on a folder's disk and print the best as the config's section ``aio``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from deepspeed.nvme import ds_io
from deepspeed.nvme.measure import Job, size_of
from deepspeed.nvme.plot import bar_chart
from deepspeed.utils.errors import explain

KEYS = ("block_size", "queue_depth", "overlap_events", "single_submit", "intra_op_parallelism")
DEFAULT_SWEEP: dict[str, list[object]] = {
    "block_size": ["1M", "8M"],
    "queue_depth": [8, 32, 128],
    "overlap_events": [True, False],
    "single_submit": [False],
    "intra_op_parallelism": [1, 2, 4],
}
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(prog="ds_nvme_tune", description=__doc__)
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--nvme_dir", nargs="+", required=True, help="folders; one process for each")
    add("--sweep_config", default=None, help="JSON file: a list of values for each setting")
    add("--no_read", **flag, help="leave reading out")
    add("--no_write", **flag, help="leave writing out")
    add("--io_size", default="400M", help="bytes that each process moves")
    add("--gpu", **flag, help="move memory of a GPU")
    add("--gds", **flag, help="GPUDirect Storage (not supported)")
    add("--flush_page_cache", **flag, help="drop the page cache before reading (needs root)")
    add("--log_dir", default="_aio_bench_logs", help="folder of results.json and results.png")
    add("--loops", type=int, default=1, help="measured rounds of each setting")
    add("--verbose", **flag, help="print each round")
    return parser


def sweep_of(path: str | None) -> list[dict[str, object]]:
    """Return every combination of settings to try.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a JSON object of lists with known keys.
    """
    lists = dict(DEFAULT_SWEEP)
    if path is not None:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError(explain("bad sweep", got=given, expected="an object of lists"))
        if "io_parallel" in given:  # the older name
            given["intra_op_parallelism"] = given.pop("io_parallel")
        for key, values in given.items():
            if key not in KEYS:
                raise ValueError(
                    explain("unknown setting in the sweep", got=key, expected=", ".join(KEYS))
                )
            lists[key] = (
                [_value(value) for value in values] if isinstance(values, list) else [values]
            )
    rows = itertools.product(*(lists[key] for key in KEYS))
    found = [dict(zip(KEYS, row, strict=True)) for row in rows]
    for settings in found:
        settings["block_size"] = size_of(str(settings["block_size"]))
    return found


def _value(value: object) -> object:
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def try_all(options: argparse.Namespace) -> list[dict[str, object]]:
    """Measure each setting; returns rows of settings with "read" and "write" in GB/s.

    Raises:
        OSError, RuntimeError, ValueError: the disk, a process or an option fails.
    """
    if options.gds:
        raise ValueError(explain("GPUDirect Storage is not supported", fix="Leave --gds out."))
    if options.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a CUDA device, and there is none")
    verbs = [verb for verb in ("read", "write") if not getattr(options, f"no_{verb}")]
    if not verbs or options.loops < 1:
        raise ValueError("nothing to measure: --no_read and --no_write leave nothing")
    nbytes = size_of(options.io_size)
    folders = [Path(name).resolve() for name in options.nvme_dir]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for settings in sweep_of(options.sweep_config):
        row = dict(settings)
        for verb in verbs:
            job = Job(folders[0], nbytes, verb == "read", loops=options.loops, **settings)
            jobs = [
                replace(
                    job,
                    folder=folder,
                    device=f"cuda:{rank}" if options.gpu else "cpu",
                    name=f"ds_nvme_tune_{rank}",
                )
                for rank, folder in enumerate(folders)
            ]
            if options.flush_page_cache and verb == "read":
                flush_page_cache()
            seconds = ds_io.run(jobs)
            if options.verbose:
                print(ds_io.report(jobs, seconds, False))
            best = min(max(times) for times in list(zip(*seconds, strict=True))[job.warmup :])
            row[verb] = nbytes * len(jobs) / best / 1e9
        rows.append(row)
    return rows


def flush_page_cache() -> None:
    """Drop what the system keeps of files in memory.

    Raises:
        OSError: not allowed, or not possible on this system.
    """
    if not _DROP_CACHES.exists():
        raise OSError("--flush_page_cache: this system has no way to drop its page cache")
    os.sync()
    _DROP_CACHES.write_text("1", encoding="ascii")


def table(rows: list[dict[str, object]]) -> str:
    """Return the results as lines of aligned columns, numbered as in the chart."""
    columns = ["#", *rows[0]]
    cells = [columns]
    for number, row in enumerate(rows, 1):
        values = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values())
        cells.append([str(number), *values])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def best_of(rows: list[dict[str, object]]) -> dict[str, object]:
    """Return the settings of the row with the highest read and write speeds together."""
    best = max(rows, key=lambda row: sum(float(str(row[v])) for v in ("read", "write") if v in row))
    return {key: best[key] for key in KEYS}


def ds_nvme_tune_main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 after one line of error."""
    options = build_parser().parse_args(args)
    try:
        rows = try_all(options)
        folder = Path(options.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows, indent=1)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        verbs = [verb for verb in ("read", "write") if verb in rows[0]]
        bar_chart(folder / "results.png", [[float(str(row[v])) for v in verbs] for row in rows])
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"ds_nvme_tune: {error}", file=sys.stderr)
        return 1
    print(f"GB/s of each setting (chart: {folder / 'results.png'}, bars: {', '.join(verbs)})")
    print(table(rows))
    print(json.dumps({"aio": best_of(rows)}, indent=4))
    return 0
