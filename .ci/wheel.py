# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel, installs it into a new environment that finds no compiler, and trains with two processes there.

python .ci/wheel.py FOLDER      everything is made below FOLDER, which is emptied first
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"


def run(*command: object, cwd: Path, **environment: str) -> None:
    print("$", *command, flush=True)
    words = [str(word) for word in command]
    settings = {**os.environ, "PYTHONUTF8": "1", **environment}
    subprocess.run(words, cwd=cwd, env=settings, check=True)


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    folder.mkdir(parents=True)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("deepspeed-*.whl")
    if "-py3-none-" not in wheel.name or wheel.name.endswith("-any.whl"):
        sys.exit(f"{wheel.name}: expected a py3-none-<platform> wheel with the native library")

    venv.create(folder / "new env", with_pip=True)
    programs = folder / "new env" / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    # PATH holds no compiler: nothing may be built from here on
    bare = {"PATH": str(programs), "CC": "", "CXX": ""}
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--only-binary=:all:",
        TORCH,
        wheel,
        cwd=folder,
        **bare,
    )
    run(programs / "ds_report", cwd=folder, **bare)
    script = shutil.copytree(ROOT / "examples" / "cifar10", folder / "cifar10") / "train.py"
    short = ["--pictures", "1280", "--epochs", "1", "--out", folder]
    run(programs / "deepspeed", "--num_gpus", "2", script, *short, cwd=folder, **bare)
    return 0


if __name__ == "__main__":
    sys.exit(main())
