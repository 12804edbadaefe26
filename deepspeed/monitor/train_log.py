# SPDX-License-Identifier: Apache-2.0
"""A run's CSV as one picture: loss, learning rate, gradient norm, throughput, memory."""

from __future__ import annotations

import argparse
import csv
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.utils.errors import explain

# panel of the picture -> parts of a column's name that belong there; the first that fits takes the column
PANELS: dict[str, tuple[str, ...]] = {
    "gradient norm": ("norm",),
    "loss": ("loss",),
    "learning rate": ("lr", "learning_rate", "learning rate"),
    "throughput": ("per_second", "per_sec", "persec", "throughput", "tokens/s", "samples/s"),
    "memory": ("mem",),
}
ORDER = ("loss", "learning rate", "gradient norm", "throughput", "memory")
_SCALE = "loss_scale"  # a scale, no loss
_STEPS = ("step", "steps", "global_step", "iteration", "iter", "epoch", "samples")


@dataclass
class Series:
    """One curve."""

    name: str
    """As the log calls it."""
    steps: list[float] = field(default_factory=list)
    """Where it was taken: steps, or samples seen, ascending as logged."""
    values: list[float] = field(default_factory=list)
    """What was taken, as many."""


def panel_of(name: str) -> str | None:
    """The panel that a column belongs to, or None."""
    low = name.lower()
    if _SCALE in low:
        return None
    words = low.replace("/", "_").replace("-", "_").replace(" ", "_").split("_")
    for panel, parts in PANELS.items():
        if any(part in words if part == "lr" else part in low for part in parts):
            return panel
    return None


def read(path: Path) -> list[Series]:
    """Read the curves of a run.

    Args:
        path: a CSV file with a header, or the folder of the CSV monitor (or one above it).

    Raises:
        FileNotFoundError: there is no such file, or no CSV file in the folder.
        ValueError: a file has no column of numbers.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.csv"))
        if not files:
            raise FileNotFoundError(
                explain(
                    "no CSV file in the folder of the log",
                    got=str(path),
                    fix="Enable 'csv_monitor' in the configuration, and give its output_path.",
                )
            )
        found = [series for file in files for series in _columns(file)]
    else:
        found = list(_columns(path))
    if not found:
        raise ValueError(
            explain(
                "the log has no column of numbers",
                got=str(path),
                expected="a first row of names, and rows of numbers below it",
            )
        )
    return found


def _columns(path: Path) -> Iterator[Series]:
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        at = next((i for i, name in enumerate(names) if name.strip().lower() in _STEPS), None)
        # the CSV monitor writes the last part of an event's name only, and the whole of it as the file's
        whole = len(names) == 2 and path.stem.endswith(f"_{names[1]}")
        columns = {
            i: Series(path.stem if whole else name) for i, name in enumerate(names) if i != at
        }
        for number, row in enumerate(rows):
            step = _number(row[at]) if at is not None and at < len(row) else float(number)
            for i, series in columns.items():
                value = _number(row[i]) if i < len(row) else None
                if value is not None and step is not None:
                    series.steps.append(step)
                    series.values.append(value)
    yield from (series for series in columns.values() if series.values)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def draw(path: Path, out: Path | None = None) -> tuple[Path, list[str]]:
    """Draw a run's curves into one PNG; no display is needed.

    Args:
        path: as in `read`.
        out: the picture; None puts it beside the file, or into the folder.

    Returns:
        The picture's path, and the names of columns that belong to no panel.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        FileNotFoundError, ValueError: as in `read`, or no column that can be drawn.
    """
    series = read(path)
    by_panel: dict[str, list[Series]] = {}
    for one in series:
        panel = panel_of(one.name)
        if panel is not None:
            by_panel.setdefault(panel, []).append(one)
    left_out = [one.name for one in series if panel_of(one.name) is None]
    if not by_panel:
        raise ValueError(
            explain(
                "the log has nothing to draw",
                got=", ".join(one.name for one in series),
                expected=f"columns about {', '.join(ORDER)}",
            )
        )
    figure = _figure(by_panel, path.name)
    if out is None:
        out = path / "train_log.png" if path.is_dir() else path.with_suffix(".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=120)
    return out, left_out


def _figure(by_panel: dict[str, list[Series]], title: str) -> Any:
    try:
        figure_module = importlib.import_module("matplotlib.figure")
        canvas = importlib.import_module("matplotlib.backends.backend_agg")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            explain(
                "drawing a training log needs package 'matplotlib', which is not installed",
                fix="Run `pip install matplotlib`.",
            ),
            name=error.name,
        ) from error
    shown = [name for name in ORDER if name in by_panel]
    figure = figure_module.Figure(figsize=(8, 2.2 * len(shown)), layout="constrained")
    canvas.FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, name in zip(_rows(figure, len(shown)), shown, strict=True):
        for one in by_panel[name]:
            axes.plot(one.steps, one.values, label=one.name, linewidth=1, marker=".", markersize=2)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if len(by_panel[name]) > 1:
            axes.legend(fontsize="x-small")
    figure.axes[-1].set_xlabel("step or samples, as logged")
    return figure


def _rows(figure: Any, count: int) -> Iterable[Any]:
    return figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--train-log`` and ``--plot-out`` to the parser of `ds_report`."""
    parser.add_argument(
        "--train-log",
        type=Path,
        metavar="RUN",
        help="draw a run's CSV file, or the CSV monitor's folder, as one PNG",
    )
    parser.add_argument(
        "--plot-out", type=Path, metavar="PNG", help="where to; default beside --train-log"
    )


def report(parser: argparse.ArgumentParser, log: Path, out: Path | None) -> None:
    """Draw, and say where the picture is; ends the program with a message where that cannot be."""
    try:
        where, left_out = draw(log, out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(where)
    if left_out:
        print(f"not drawn: {', '.join(left_out)}")
