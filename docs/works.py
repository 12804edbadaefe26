# SPDX-License-Identifier: Apache-2.0
"""README's table of libraries that work: recorded from test runs, written between two marks, never by hand.

python docs/works.py record     run the tests of other libraries with this Python, keep what they say
python docs/works.py table      write README's table from what was kept
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as tree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "works.json"
README = ROOT / "README.md"
MARKS = ("<!-- from docs/works.json, by docs/works.py -->", "<!-- end of works -->")
TESTS = ("tests/ecosystem", "tests/unit/inference/test_decoder.py")

# what a row is called -> its package, and what a test's name has in it; the first that fits takes the test
ROWS = {
    "PEFT": ("peft", ("adapters", "peft_lora")),
    "TRL, SFT and DPO": ("trl", ("trl_",)),
    "Lightning": ("lightning", ("lightning",)),
    "Accelerate": ("accelerate", ("test_accelerate", "accelerate_loop")),
    "Transformers, `init_inference`": ("transformers", ("test_decoder",)),
    "Transformers, Trainer": ("transformers", ("test_trainer", "trainer.py")),
}


def environment() -> str:
    """This Python, its torch and its transformers, as a column's name."""
    torch = importlib.metadata.version("torch").split("+")[0]
    python = ".".join(platform.python_version_tuple()[:2])
    models = version("transformers")
    return f"torch {torch}, transformers {models}, Python {python}, {platform.system()}"


def version(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def row_of(case: tree.Element) -> str | None:
    """The row that a test counts for."""
    name = f"{case.get('classname')}.{case.get('name')}"
    return next((row for row, (_, parts) in ROWS.items() if any(p in name for p in parts)), None)


def count(report: Path) -> dict[str, dict[str, object]]:
    """Results by row, of one report in the form of JUnit."""
    found: dict[str, dict[str, object]] = {}
    for case in tree.parse(report).iter("testcase"):
        row = row_of(case)
        if row is None:
            continue
        package = ROWS[row][0]
        sums = found.setdefault(row, {"version": version(package), "passed": 0, "of": 0})
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        sums["of"] += 1
        sums["passed"] += not failed
    return {row: sums for row, sums in found.items() if sums["of"]}


def record() -> int:
    """Run the tests, and keep their results under this environment's name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS]
        code = subprocess.run(command, cwd=ROOT).returncode
        results = count(report)
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    kept[environment()] = results
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return code


def table() -> str:
    """The table in Markdown: a library a row, an environment a column."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    lines = [
        "| library | " + " | ".join(kept) + " |",
        "| --- " * (len(kept) + 1) + "|",
    ]
    for row in sorted(ROWS):
        cells = []
        for results in kept.values():
            one = results.get(row)
            cells.append(f"{one['version']}: {one['passed']} of {one['of']}" if one else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write() -> None:
    """Put the table into README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    README.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        sys.exit(record())
    if sys.argv[1:] != ["table"]:
        sys.exit(__doc__)
    write()
