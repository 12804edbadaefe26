# SPDX-License-Identifier: Apache-2.0
"""The native library by itself, without Python: under sanitizers here, and on 64-bit Arm through an emulator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from op_builder import build

PROGRAM = Path(__file__).with_name("native_check.cpp")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers and emulators of Linux"),
]


def program(folder, compiler, target, extra=()):
    """Compile the library's sources and the program into one file, each ISA unit with its flags."""
    objects = []
    units = build.UNITS[target.machine]
    jobs = [(source, ()) for source in (*build.COMMON, *build.ENTRIES, str(PROGRAM))]
    jobs += [(f"cpu/isa_{unit}.cpp", flags) for unit, (flags, _) in units.items()]
    for source, flags in jobs:
        item = folder / (Path(source).stem + ".o")
        command = build.compile_unit(compiler, target, source, (*flags, *extra))
        subprocess.run([*command, "-o", str(item)], check=True, cwd=folder)
        objects.append(str(item))
    made = folder / "native_check"
    words = [*compiler.words]
    if compiler.family == "zig":
        words += ["-target", target.zig]
    subprocess.run([*words, *extra, *objects, "-pthread", "-o", str(made)], check=True, cwd=folder)
    return made


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_paths_agree_under_sanitizers(tmp_path, sanitizers):
    gnu = build.Compiler(("g++",), "gnu")
    flags = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g")
    made = program(tmp_path, gnu, build.native_target(), flags)
    done = subprocess.run([str(made)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "scalar" in done.stdout


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no emulator of 64-bit Arm here")
@pytest.mark.skipif(find_spec("ziglang") is None, reason="no zig here")
def test_paths_agree_on_arm(tmp_path):
    zig = build.Compiler((sys.executable, "-m", "ziglang", "c++"), "zig")

    class Static(build.Target):
        zig = "aarch64-linux-musl"  # no loader or libraries of that system are needed

    made = program(tmp_path, zig, Static("linux_aarch64", "linux", "arm64"))
    done = subprocess.run(["qemu-aarch64", str(made)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "neon scalar" in done.stdout
