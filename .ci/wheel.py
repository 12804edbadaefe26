# SPDX-License-Identifier: Apache-2.0
"""Builds the wheels of Linux and Windows by the documented command, and tries this system's in a new environment.

python .ci/wheel.py FOLDER      everything is made below FOLDER, which is emptied first

No compiler is in reach of that environment and it knows nothing of the tree: the wheel installs in seconds over torch,
reports itself, passes the tests of its ops, and trains with two processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from op_builder import binaries, wheels  # noqa: E402

TORCH = "torch==2.13.0"
MOST_SECONDS = 5.0  # of an installation, when torch and what else it needs are there
OP_TESTS = ("registry", "native", "optimizers", "op_builder", "threads", "pages")


def run(*command: object, cwd: Path, **environment: str) -> None:
    print("$", *command, flush=True)
    words = [str(word) for word in command]
    settings = {**os.environ, "PYTHONUTF8": "1", **environment}
    subprocess.run(words, cwd=cwd, env=settings, check=True)


def build(folder: Path) -> Path:
    """Build both wheels, print what they hold, and return the one for this system."""
    try:
        made = wheels.build_wheels(folder)
    except (wheels.WheelError, binaries.BinaryError) as error:
        sys.exit(f"error: {error}")
    print(*made, sep="\n", flush=True)
    here = "win" if os.name == "nt" else "linux"
    (wheel,) = (contents.wheel for contents in made if here in contents.wheel.name)
    return wheel


def install(folder: Path, wheel: Path) -> Path:
    """Install a wheel into a new environment, on top of torch; returns the folder of its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [programs / "python", "-m", "pip", "install", "-q", "--only-binary=:all:"]
    run(*pip, TORCH, wheel, "pytest>=8", "pytest-timeout", cwd=folder)
    seconds = min(_reinstall(folder, pip, wheel) for _ in range(2))
    print(f"installed over torch in {seconds:.1f} s", flush=True)
    if seconds > MOST_SECONDS:
        sys.exit(f"installing took {seconds:.1f} s, at most {MOST_SECONDS:.0f} are allowed")
    return programs


def _reinstall(folder: Path, pip: list[object], wheel: Path) -> float:
    run(*pip[:3], "uninstall", "-q", "-y", "deepspeed", cwd=folder)
    start = time.monotonic()
    run(*pip, "--no-deps", wheel, cwd=folder)
    return time.monotonic() - start


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    programs = install(folder / "new env", build(folder))
    # PATH holds no compiler: nothing may be built from here on
    bare = {"PATH": str(programs), "CC": "", "CXX": ""}
    run(programs / "ds_report", cwd=folder, **bare)

    outside = folder / "outside of the tree"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", outside / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", outside)
    tests = [f"tests/unit/ops/test_{name}.py" for name in OP_TESTS]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600", *tests]
    run(programs / "python", *words, cwd=outside, **bare)

    script = shutil.copytree(ROOT / "examples" / "cifar10", folder / "cifar10") / "train.py"
    short = ["--pictures", "1280", "--epochs", "1", "--out", folder]
    run(programs / "deepspeed", "--num_gpus", "2", script, *short, cwd=folder, **bare)
    return 0


if __name__ == "__main__":
    sys.exit(main())
