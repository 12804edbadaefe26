# SPDX-License-Identifier: Apache-2.0
"""The loader of the native library: missing, broken, of another version, forced paths, and what each says."""

from __future__ import annotations

import ctypes
import ctypes.util
import subprocess
import sys

import pytest
import torch

from deepspeed.ops import abi, native, registry
from deepspeed.ops.norms import squared_norm
from deepspeed.utils import env

needs_library = pytest.mark.skipif(
    native.status().route != "native", reason="there is no native library here"
)


@pytest.fixture
def library_at(monkeypatch, fresh_loader):
    """Return a function that names the library's file for this test."""

    def choose(path):
        monkeypatch.setenv(env.DS_NATIVE_LIBRARY.name, str(path))

    return choose


def test_importing_opens_no_library():
    code = (
        "import deepspeed.ops.adam, deepspeed.ops.adam.cpu_adam, deepspeed.ops.native as n;"
        "assert n._cached is None and not n._opened"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_leaves_the_reference_and_a_reason(fresh_loader, monkeypatch, tmp_path):
    monkeypatch.delenv(env.DS_NATIVE_LIBRARY.name, raising=False)
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    assert squared_norm(torch.ones(5)).item() == 5
    assert {route.route for route in registry.routes()} == {"reference"}
    assert "compiler" in registry.routes()[0].reason


def test_the_reason_of_a_failed_build_reaches_the_report(fresh_loader, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    (tmp_path / "build.json").write_text('{"problem": "g++ said no"}', encoding="utf-8")
    assert "g++ said no" in registry.routes()[0].reason


def test_a_damaged_library_raises_with_cause_and_cure(library_at, tmp_path):
    path = tmp_path / native.LIBRARY_NAME
    path.write_bytes(b"not a library")
    library_at(path)
    for _ in range(2):  # at every call, not only at the first
        with pytest.raises(native.NativeLibraryError, match="cannot be loaded") as caught:
            squared_norm(torch.ones(5))
        assert "DS_CPU_ISA=reference" in str(caught.value)
    assert {route.route for route in registry.routes()} == {"broken"}


def test_a_damaged_library_does_not_hinder_the_reference(library_at, tmp_path, monkeypatch):
    path = tmp_path / native.LIBRARY_NAME
    path.write_bytes(b"not a library")
    library_at(path)
    monkeypatch.setenv(env.DS_CPU_ISA.name, "reference")
    assert squared_norm(torch.ones(5)).item() == 5


def test_a_named_library_must_exist(library_at, tmp_path):
    library_at(tmp_path / "none.so")
    with pytest.raises(native.NativeLibraryError, match="DS_NATIVE_LIBRARY does not exist"):
        squared_norm(torch.ones(5))


@needs_library
def test_a_library_without_our_functions_raises(fresh_loader):
    other = ctypes.util.find_library("c") if sys.platform != "win32" else "kernel32.dll"
    if other is None:
        pytest.skip("no other library at hand")
    with pytest.raises(native.NativeLibraryError, match="lacks a function"):
        native.NativeLibrary(type(native.LIBRARY_DIR)(other))


@needs_library
def test_a_library_of_another_abi_version_raises(fresh_loader, monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(native.NativeLibraryError, match="ABI version"):
        native.NativeLibrary(native.library_path())


@needs_library
def test_a_library_of_another_layout_raises(fresh_loader, monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = (*abi.NormArgs._fields_, ("more", ctypes.c_double))

    monkeypatch.setitem(abi.STRUCTS, "ds_norm_args", Longer)
    with pytest.raises(native.NativeLibraryError, match="layout of ds_norm_args"):
        native.NativeLibrary(native.library_path())


@needs_library
def test_a_struct_of_another_size_is_refused_by_the_kernel():
    library = native.load()
    assert library is not None
    assert library.entry("ds_squared_norm")(b"\x08" + b"\0" * 63) != 0
    assert "struct of 8 bytes given" in library.error()


@needs_library
@pytest.mark.parametrize("path", native.status().available)
def test_a_path_is_forced_by_the_environment(fresh_loader, monkeypatch, path):
    monkeypatch.setenv(env.DS_CPU_ISA.name, path)
    assert native.status().isa == path
    registry.use_isa("auto")


@needs_library
@pytest.mark.parametrize("name", ["sse9", "avx1024"])
def test_an_unknown_path_is_refused(fresh_loader, monkeypatch, name):
    monkeypatch.setenv(env.DS_CPU_ISA.name, name)
    with pytest.raises(ValueError, match="scalar"):
        squared_norm(torch.ones(3))
    assert native.status().route == "broken"


def test_the_packed_formats_have_the_layout_of_the_ctypes_structs():
    for name, structure in abi.STRUCTS.items():
        form = abi.FORMATS[name]
        assert form.size == ctypes.sizeof(structure)
        values = [i + 1 for i in range(len(structure._fields_))]
        packed = structure.from_buffer_copy(form.pack(*values))
        assert [getattr(packed, field) for field, _ in structure._fields_] == values
