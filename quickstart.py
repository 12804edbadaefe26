# SPDX-License-Identifier: Apache-2.0
"""From a fresh clone to a trained network, and to passed tests, with Python's standard library alone.

    python quickstart.py           make an environment in .venv, install, train a small CIFAR-10 network
    python quickstart.py test      pass the checks and tests in that same environment

The same on Windows, Linux and macOS. A second run finds the environment ready and starts at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
# the longest files first: workers end together
TESTS = ("dist", "structure", "contract", "unit", "cuda")
PACKED = (".py", ".toml", ".md", ".cpp", ".h", ".inl", ".c", ".cu", ".cuh")
SOURCES = ("pyproject.toml", "setup.py", "deepspeed", "csrc", "op_builder", "README.md")


class Environment:
    """A virtual environment: where its programs are, and what has been installed into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.programs / ("python.exe" if os.name == "nt" else "python")
        self.stamp = folder / "quickstart.json"

    def ready(self, want: dict[str, object]) -> bool:
        """True where a finished run installed all of `want` (its extras may be more than asked for)."""
        try:
            have = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return have["extras"] in (want["extras"], "dev") and all(
            have.get(key) == value for key, value in want.items() if key != "extras"
        )

    def make(self) -> None:
        """Create the environment unless its Python runs; what a broken attempt left is replaced."""
        if self.python.exists() and run([self.python, "-m", "pip", "--version"], quiet=True) == 0:
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / "pyvenv.cfg").exists():
                sys.exit(
                    f"{self.folder} exists and is no virtual environment: give another with --env"
                )
            shutil.rmtree(self.folder)
        say(f"make {self.folder}")
        if run([sys.executable, "-m", "venv", self.folder]) != 0:
            sys.exit(
                "could not make the environment (on Debian and Ubuntu: apt install python3-venv)"
            )

    def install(self, torch: str, extras: str) -> None:
        """Install torch and this package, if the sources or the wishes changed since the last time."""
        want = {"torch": torch, "extras": extras, "source": fingerprint()}
        if self.ready(want):
            return
        self.make()
        say(f"install {torch} and deepspeed" + (f" [{extras}]" if extras else ""))
        self.stamp.unlink(missing_ok=True)
        shutil.rmtree(HERE / "build", ignore_errors=True)  # old modules there would be packed again
        # tests read the tree, so its native library is built there; training uses a copy, as users have
        package = ["-e", f"{HERE}[{extras}]"] if extras else [str(HERE)]
        options = ["--disable-pip-version-check", *([] if sys.stdout.isatty() else ["-qq"])]
        if run([self.python, "-m", "pip", "install", *options, torch, *package]) != 0:
            sys.exit("the installation failed; its last lines say why")
        self.stamp.write_text(json.dumps(want), encoding="utf-8")


def fingerprint() -> str:
    """A hash over the files that go into the package."""
    digest = hashlib.sha256(sys.version.encode())
    for name in SOURCES:
        top = HERE / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and path.suffix in PACKED:
                name = path.relative_to(HERE).as_posix()
                digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(command: list[object], quiet: bool = False, cwd: Path = HERE) -> int:
    """Run a program to its end with UTF-8 text in and out; returns its exit code."""
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.run(words, cwd=cwd, env=environment, stdout=sink, stderr=sink).returncode


def train(environment: Environment, options: argparse.Namespace, rest: list[str]) -> int:
    """Train through the `deepspeed` launcher; the script prints the curve, the accuracy and the plot."""
    launcher = environment.programs / ("deepspeed.exe" if os.name == "nt" else "deepspeed")
    script = HERE / "examples" / "cifar10" / "train.py"
    chosen = ["--data", options.data.resolve()] if options.data else []
    say("deepspeed " + " ".join(["examples/cifar10/train.py", *map(str, chosen), *rest]))
    return run([launcher, script, "--out", HERE / "out", *chosen, *rest])


def spread() -> list[str]:
    """pytest's words for a worker a core, at most four: tests start processes of their own. A file stays with one."""
    return ["-q", "-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile"]


def test(environment: Environment, rest: list[str]) -> int:
    """Lint, types, then every test that this machine can run; the worst exit code of them."""
    python = environment.python
    folders = [f"tests/{name}" for name in TESTS if (HERE / "tests" / name).is_dir()]
    stages = [
        ("lint", [python, "-m", "ruff", "check", "."]),
        ("format", [python, "-m", "ruff", "format", "--check", "."]),
        ("types", [python, "-m", "mypy"]),
        ("tests", [python, "-m", "pytest", "--timeout=600", *(rest or [*spread(), *folders])]),
    ]
    codes = {}
    for name, command in stages:
        say(name)
        start = time.monotonic()
        codes[name] = run(command)
        print(f"-- {name}: exit {codes[name]}, {time.monotonic() - start:.0f} s", flush=True)
    bad = [name for name, code in codes.items() if code]
    say(f"failed: {', '.join(bad)}" if bad else "all passed")
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="python quickstart.py [train | test] [options] [words for the script or for pytest]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further words go to the training script (--epochs 5, --dtype bf16) or to pytest.",
    )
    parser.add_argument(
        "--data", type=Path, help="a folder with CIFAR-10 (else pictures are drawn)"
    )
    parser.add_argument("--env", type=Path, default=HERE / ".venv", help="the environment's folder")
    parser.add_argument("--torch", default=TORCH, help=f"what pip installs, default {TORCH}")
    parser.add_argument("--no-install", action="store_true", help="use --env as it is")
    words = sys.argv[1:]
    command = words.pop(0) if words[:1] in (["train"], ["test"]) else "train"
    options, rest = parser.parse_known_args(words)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    if sys.version_info < (3, 10) or sys.maxsize < 2**32:
        sys.exit(f"needs a 64-bit Python 3.10 or newer, this is {sys.version}")
    environment = Environment(options.env.resolve())
    if not options.no_install:
        environment.install(options.torch, "dev" if command == "test" else "")
    return test(environment, rest) if command == "test" else train(environment, options, rest)


if __name__ == "__main__":
    sys.exit(main())
