# SPDX-License-Identifier: Apache-2.0
"""The gate of the wheels: what a library asks of its system, read from ELF and PE, and what a wheel must hold."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest

from deepspeed.ops import native
from op_builder import binaries, wheels


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf here")
@pytest.mark.skipif(sys.platform != "linux" or native.status().route != "native", reason="no ELF")
def test_elf_is_read_as_binutils_reads_it():
    path = native.library_path()
    listing = subprocess.run(
        ["readelf", "-W", "-d", "-V", str(path)], check=True, capture_output=True, text=True
    ).stdout
    needs = binaries.needs(path)
    assert list(needs.libraries) == re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    versions = re.findall(r"Name: GLIBC_(2[.\d]+)", listing)
    assert needs.glibc == max(tuple(map(int, word.split("."))) for word in versions)


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="no g++ here")
def test_what_not_every_system_has_is_refused(tmp_path):
    source, library = tmp_path / "f.cpp", tmp_path / "libds_cpu.so"
    source.write_text('#include <string>\nstd::string f() { return "x"; }', encoding="utf-8")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(binaries.BinaryError, match=r"needs libstdc\+\+\.so\.6"):
        binaries.check(library, (9,))
    static = ["-static-libstdc++", "-static-libgcc"]
    subprocess.run(
        ["g++", "-shared", "-fPIC", *static, str(source), "-o", str(library)], check=True
    )
    with pytest.raises(binaries.BinaryError, match=r"needs glibc 2\.\d+, the promise is 2\.1"):
        binaries.check(library, (2, 1))


@pytest.mark.skipif(sys.platform == "darwin" or native.status().route != "native", reason="no ELF")
@pytest.mark.parametrize("length", [64, 1000, 20000])
def test_a_library_that_is_cut_short_is_refused(tmp_path, length):
    path = tmp_path / native.library_path().name
    path.write_bytes(native.library_path().read_bytes()[:length])
    with pytest.raises(binaries.BinaryError, match="damaged"):
        binaries.needs(path)


def test_files_that_are_no_libraries_are_refused(tmp_path):
    path = tmp_path / "ds_cpu.dll"
    for content in (b"", b"!<arch>", b"MZ", b"MZ" + bytes(200), b"\x7fELF\x02", b"\x7fELF\x01" * 9):
        path.write_bytes(content)
        with pytest.raises(binaries.BinaryError):
            binaries.needs(path)


def test_a_wheel_without_its_parts_is_refused(tmp_path):
    path = tmp_path / "deepspeed-0.20.0-py3-none-any.whl"
    with pytest.raises(wheels.WheelError, match="py3-none-<platform>"):
        wheels.inspect(path)
    path = tmp_path / "deepspeed-0.20.0-py3-none-win_amd64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deepspeed/ops/lib/ds_cpu.dll", b"")
    with pytest.raises(wheels.WheelError, match=r"kernels\.zip"):
        wheels.inspect(path)


def test_a_wheel_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "MOST_BYTES", 10)
    path = tmp_path / "deepspeed-0.20.0-py3-none-win_amd64.whl"
    path.write_bytes(bytes(11))
    with pytest.raises(wheels.WheelError, match="11 bytes, at most 10"):
        wheels.inspect(path)


def test_tools_of_an_older_version_are_not_taken(monkeypatch):
    versions = {"setuptools": "84.2.1", "wheel": "0.38.0rc1", "ziglang": "0.9.5"}

    def version(name):
        if name not in versions:
            raise wheels.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(wheels.metadata, "version", version)
    assert [wheels._is_installed(tool) for tool in wheels.TOOLS] == [True, True, False, False]
    name, _, only = wheels.NVRTC.partition("==")
    for other, taken in ((only, True), (f"{only}.1", False), ("99.0", False)):
        versions[name] = other
        assert wheels._is_installed(wheels.NVRTC) is taken


@pytest.mark.slow
@pytest.mark.skipif(find_spec("setuptools") is None, reason="no setuptools here")
@pytest.mark.skipif(sys.platform == "win32", reason="built by build_win.bat there")
def test_a_failing_build_shows_its_words(tmp_path):
    with pytest.raises(wheels.WheelError, match=r"(?s)pip wheel.*failed.*setup\.py"):
        (tmp_path / "setup.py").write_text("raise SystemExit('setup.py is out of order')", "utf-8")
        wheels._wheel(sys.executable, tmp_path, tmp_path / "out", wheels.NATIVE)
