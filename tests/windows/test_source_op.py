# SPDX-License-Identifier: Apache-2.0
"""A user's own C++ op under Windows: planned, linked with python3xx.dll, kept, and imported.

Under Wine no compiler runs (zig and ninja start there, but zig's calls to the system fail): the commands that the
Windows Python plans are run beside it, by the cross-compiler of the Linux system.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.windows import winpy

CROSS = "x86_64-w64-mingw32-g++-posix"
SOURCE = """
#include <pybind11/pybind11.h>
#include "zahl.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("times", [](int x) { return x * ZAHL; }); }
"""
PROGRAM = """
import json, sys, time
from pathlib import Path
from deepspeed.ops.op_builder import OpBuilder, source, toolchain
folder, includes = Path(sys.argv[1]), sys.argv[2:]

def run_beside(plan, work, verbose):
    record = {"work": str(work), "commands": [*plan.compile, plan.link]}
    (folder / "asked.part").write_text(json.dumps(record), encoding="utf-8")
    (folder / "asked.part").rename(folder / "asked.json")
    while not (folder / "done").exists():
        time.sleep(0.1)
    return toolchain._files_read(plan, work)

class Mine(OpBuilder):
    NAME = "times"
    def sources(self): return [str(folder / "größe.cpp")]
    def include_paths(self): return includes

if includes:
    toolchain.run = run_beside
    toolchain.ninja = lambda: "ninja"
assert Mine().is_compatible(), Mine()._obstacle()
module = Mine().load(verbose=False)
assert module.__file__.endswith(".pyd") and source.folder() in Path(module.__file__).parents
toolchain.run = None  # the second time it is found
OpBuilder._loaded_ops.clear()
print("answer", Mine().load(verbose=False).times(14))
"""
NO_COMPILER = """
from deepspeed.ops.op_builder import OpBuilder
class Mine(OpBuilder):
    NAME = "mine"
    def sources(self): return [__import__("sys").executable]
print(Mine().is_compatible(), Mine()._obstacle())
"""


def unix(word):
    return word.replace("Z:\\", "/").replace("\\", "/")


def compile_beside(folder):
    """Do what the Windows program asks for, with this system's names of its files."""
    for _ in range(2400):
        if (folder / "asked.json").exists():
            break
        threading.Event().wait(0.1)
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    work = Path(unix(asked["work"]))
    for words in asked["commands"]:
        command = [unix(word) for word in words]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            (folder / "failed.txt").write_text(
                f"{shlex.join(command)}\n{done.stderr}", encoding="utf-8"
            )
    (folder / "done").write_bytes(b"")


def test_it_is_made_kept_and_imported(windows, folder):
    (folder / "größe.cpp").write_text(SOURCE, encoding="utf-8")
    (folder / "zahl.h").write_text("#define ZAHL 3\n", encoding="utf-8")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    words = [winpy.windows_path(folder / "program.py"), winpy.windows_path(folder)]
    settings = {"TORCH_EXTENSIONS_DIR": winpy.windows_path(folder / "Cäche")}
    helper = None
    if not winpy.NATIVE:
        if shutil.which(CROSS) is None or find_spec("pybind11") is None:
            pytest.skip(f"no {CROSS} or no pybind11 here")
        import pybind11

        headers = (winpy.HOME / "include", Path(pybind11.get_include()))
        words += [winpy.windows_path(path) for path in headers]
        settings |= {"CXX": CROSS}
        helper = threading.Thread(target=compile_beside, args=(folder,), daemon=True)
        helper.start()
    done = windows.run("python", *words, PYTHONSAFEPATH="1", **settings)
    failure = folder / "failed.txt"
    told = failure.read_text(encoding="utf-8") if failure.exists() else ""
    assert done.returncode == 0 and "answer 42" in done.stdout, done.stdout + told


@pytest.mark.skipif(sys.platform == "win32", reason="this machine may have a compiler")
def test_a_missing_compiler_is_named_with_the_cure(windows):
    done = windows.python("-c", NO_COMPILER)
    assert done.stdout.startswith("False"), done.stdout
    assert "ninja" in done.stdout or "ziglang" in done.stdout
