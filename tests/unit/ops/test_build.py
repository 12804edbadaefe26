# SPDX-License-Identifier: Apache-2.0
"""The build of the native library: fresh generated files, clean ISA units, no run-time dependences, no compiler."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from deepspeed.ops import native
from op_builder import abi, binaries, build

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


def _makers():
    """Each compiler here with what it builds for, as the wheels of this system and of Windows are made."""
    wheels = ("manylinux_2_17_x86_64", "win_amd64")
    targets = [build.native_target(), *map(build.target_of, wheels)]
    found = [(c, t, "-O0") for t in targets for c in build.find_compilers(t) if c.family != "msvc"]
    # without optimization more is left to be shared; with it, one compiler stands for all
    found += [(*found[0][:2], "-O3")] if found else []
    return [pytest.param(*each, id=f"{each[0].words[-1]}-{each[1].tag}{each[2]}") for each in found]


@pytest.mark.parametrize(("compiler", "target", "level"), _makers())
def test_isa_units_define_nothing_that_others_could_pick_up(tmp_path, compiler, target, level):
    prefix = "x86_64-w64-mingw32-" if target.system != build.native_target().system else ""
    if shutil.which(f"{prefix}nm") is None:
        pytest.skip(f"no {prefix}nm here")
    for unit, (flags, _) in build.UNITS[target.machine].items():
        item = tmp_path / f"{unit}.o"
        command = build.compile_unit(compiler, target, f"cpu/isa_{unit}.cpp", (*flags, level))
        subprocess.run([*command, "-o", str(item)], check=True, capture_output=True)
        listing = _words([f"{prefix}nm", str(item)])
        symbols = [line.split()[-2:] for line in listing.splitlines()]
        weak = [name for kind, name in symbols if kind in "uUwWvV" and kind != "U"]
        assert weak == []
        # ".refptr." is MinGW's address of something elsewhere: equal everywhere
        shared = [
            n for kind, n in symbols if kind.isupper() and kind not in "UN" and ".refptr." not in n
        ]
        assert [name.lstrip("_") for name in shared] == [f"ds_kernels_{unit}"]
        # and nothing runs when the library is loaded
        if shutil.which(f"{prefix}objdump") is not None:
            sections = _words([f"{prefix}objdump", "-h", str(item)])
            assert ".text" in sections
            assert not [word for word in (".init_array", ".ctors", ".CRT") if word in sections]


def _words(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform == "darwin", reason="reads ELF and PE")
@pytest.mark.skipif(native.status().route != "native", reason="there is no native library here")
def test_the_library_needs_only_what_every_system_has():
    needs = binaries.check(native.library_path(), glibc_floor=(3,))  # built here: for this system
    assert needs.libraries


@needs_compiler
def test_a_build_leaves_the_library_and_its_record(tmp_path):
    library = build.build(tmp_path)
    assert library.exists()
    record = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))
    assert record["compiler"] == COMPILERS[0].name
    assert "scalar" in record["units"]
    assert native.NativeLibrary(library).isas[-1] == "scalar"


MAGIC = {"windows": b"MZ", "linux": b"\x7fELF", "darwin": b"\xcf\xfa\xed\xfe"}
# MinGW's and the one for old Linux systems are made and checked where the wheels are (.ci/wheel.py)
CROSS = [("win_amd64", "ziglang"), ("win_arm64", "ziglang")]
CROSS += [("manylinux_2_17_aarch64", "ziglang"), ("macosx_11_0_arm64", "ziglang")]


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "compiler"), CROSS)
def test_the_library_of_another_platform_is_built_from_here(tmp_path, tag, compiler):
    target = build.target_of(tag)
    if not any(compiler in found.name for found in build.find_compilers(target)):
        pytest.skip(f"no {compiler} here")
    library = build.build(tmp_path, target, compiler)
    assert library.name == target.library
    assert library.read_bytes().startswith(MAGIC[target.system])
    if target.system != "darwin":
        needs = binaries.check(library, build.GLIBC_FLOOR)
        assert needs.libraries and (needs.glibc is None) == (target.system == "windows")


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
