# SPDX-License-Identifier: Apache-2.0
"""The build of the native library: fresh generated files, clean ISA units, no run-time dependences, no compiler."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed.ops import native
from op_builder import abi, build

COMPILERS = [c for c in build.find_compilers(build.native_target()) if c.family == "gnu"]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no GCC or clang here")


def test_generated_files_are_fresh():
    assert abi.stale_files() == []


def test_the_build_imports_neither_torch_nor_the_package():
    code = (
        "import sys, op_builder.build, op_builder.abi;"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=build.ROOT)


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
@pytest.mark.parametrize("level", ["-O0", "-O3"])
@pytest.mark.parametrize("unit", build.UNITS[build.native_target().machine])
def test_isa_units_define_nothing_that_others_could_pick_up(tmp_path, unit, level):
    flags = build.UNITS[build.native_target().machine][unit][0]
    item = tmp_path / "unit.o"
    command = build.compile_unit(
        COMPILERS[0], build.native_target(), f"cpu/isa_{unit}.cpp", (*flags, level)
    )
    subprocess.run([*command, "-o", str(item)], check=True, capture_output=True)
    listing = subprocess.run(["nm", str(item)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    weak = [name for kind, name in symbols if kind in "uUwWvV" and kind != "U"]
    assert weak == []
    shared = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert [name.lstrip("_") for name in shared] == [f"ds_kernels_{unit}"]
    # and nothing runs when the library is loaded
    assert ".init_array" not in _sections(item)


def _sections(item: Path) -> str:
    if shutil.which("objdump") is None:
        return ""
    return subprocess.run(
        ["objdump", "-h", str(item)], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf here")
@pytest.mark.skipif(native.status().route != "native", reason="there is no native library here")
def test_the_library_needs_only_what_every_system_has():
    listing = subprocess.run(
        ["readelf", "-d", str(native.library_path())], check=True, capture_output=True, text=True
    ).stdout
    needed = {line.split("[")[1].split("]")[0] for line in listing.splitlines() if "NEEDED" in line}
    own = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= own


@needs_compiler
def test_a_build_leaves_the_library_and_its_record(tmp_path):
    library = build.build(tmp_path)
    assert library.exists()
    record = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))
    assert record["compiler"] == COMPILERS[0].name
    assert "scalar" in record["units"]
    assert native.NativeLibrary(library).isas[-1] == "scalar"


MAGIC = {"windows": b"MZ", "linux": b"\x7fELF", "darwin": b"\xcf\xfa\xed\xfe"}
CROSS = [("win_amd64", "mingw"), ("win_amd64", "ziglang"), ("win_arm64", "ziglang")]
CROSS += [("linux_aarch64", "ziglang"), ("macosx_11_0_arm64", "ziglang")]


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "compiler"), CROSS)
def test_the_library_of_another_platform_is_built_from_here(tmp_path, tag, compiler):
    target = build.target_of(tag)
    if not any(compiler in found.name for found in build.find_compilers(target)):
        pytest.skip(f"no {compiler} here")
    library = build.build(tmp_path, target, compiler)
    assert library.name == target.library
    assert library.read_bytes().startswith(MAGIC[target.system])


def test_an_output_that_is_no_library_is_refused(tmp_path):
    made = tmp_path / "ds_cpu.dll"
    made.write_bytes(b"!<arch> an archive")
    foreign = "win_arm64" if build.native_target().tag != "win_arm64" else "linux_aarch64"
    with pytest.raises(build.BuildError, match="not a shared library"):
        build._check(made, build.target_of(foreign), str(tmp_path))
    with pytest.raises(build.BuildError):
        build._check(made, build.native_target(), str(tmp_path))


def test_no_compiler_leaves_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_compilers", lambda target: [])
    (tmp_path / build.native_target().library).write_bytes(b"of an older build")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json"]
    record = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))
    assert "no C++ compiler" in record["problem"]


def test_a_failing_compiler_is_passed_over_and_reported(tmp_path, monkeypatch):
    failing = build.Compiler((sys.executable, "-c", "raise SystemExit('out of order')"), "gnu")
    monkeypatch.setattr(build, "find_compilers", lambda target: [failing])
    with pytest.raises(build.BuildError, match="out of order"):
        build.build(tmp_path)


@pytest.mark.parametrize(
    ("tag", "system", "machine"),
    [
        ("win-amd64", "windows", "x86_64"),
        ("win_arm64", "windows", "arm64"),
        ("linux-x86_64", "linux", "x86_64"),
        ("manylinux_2_17_aarch64", "linux", "arm64"),
        ("macosx-11.0-arm64", "darwin", "arm64"),
        ("linux-ppc64le", "linux", "other"),
    ],
)
def test_platform_tags_are_understood(tag, system, machine):
    target = build.target_of(tag)
    assert (target.system, target.machine) == (system, machine)
