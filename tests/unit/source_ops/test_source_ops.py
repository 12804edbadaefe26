# SPDX-License-Identifier: Apache-2.0
"""A user's own C++ op: compiled once, found again by content, safe among builders that race or are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deepspeed.ops.op_builder import OpBuilder, source, toolchain
from deepspeed.ops.op_builder.compilers import find_compilers, native_target
from deepspeed.ops.op_builder.toolchain import SourceOpError

ZIG = [sys.executable, "-m", "ziglang", "c++"]
HERE = find_compilers(native_target())
pytestmark = [
    pytest.mark.skipif(not HERE, reason="no C++ compiler here"),
    pytest.mark.skipif(find_spec("pybind11") is None, reason="no pybind11 here"),
]
PLAIN = """
#include <pybind11/pybind11.h>
#include "teil/faktor.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("times", [](int x) { return x * FAKTOR; }); }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sources and cache in folders whose names have spaces, umlauts and a dollar."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ein Cäche $x"))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    made = tmp_path / "mit Größe & Leerzeichen"
    (made / "teil").mkdir(parents=True)
    (made / "times.cpp").write_text(PLAIN, encoding="utf-8")
    (made / "teil" / "faktor.h").write_text("#define FAKTOR 3\n", encoding="utf-8")
    return made


def returns(value):
    return lambda self: value


def builder(folder, name="times", files=("times.cpp",), **methods):
    given = {"NAME": name, "sources": lambda self: [str(folder / file) for file in files]}
    given |= {key: returns(value) for key, value in methods.items()}
    return type("Mine", (OpBuilder,), given)()


ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("times", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.times(5))
"""


def times(folder, **methods):
    """The op's answer in a process of its own: one process keeps the first module of a name."""
    OpBuilder._loaded_ops.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_import", lambda name, path: path)
        path = builder(folder, **methods).load(verbose=False)
    words = [sys.executable, "-c", ALONE, str(path)]
    return int(subprocess.run(words, capture_output=True, check=True, encoding="utf-8").stdout)


def builds(monkeypatch):
    """A list that grows with each compilation."""
    real, seen = toolchain.run, []
    monkeypatch.setattr(toolchain, "run", lambda *words: seen.append(1) or real(*words))
    return seen


def test_content_decides_whether_it_is_compiled_again(folder, monkeypatch):
    seen = builds(monkeypatch)
    assert times(folder) == 15
    (folder / "times.cpp").touch()
    assert times(folder) == 15 and len(seen) == 1
    header = folder / "teil" / "faktor.h"
    header.write_text("#define FAKTOR 4\n", encoding="utf-8")
    assert times(folder) == 20 and len(seen) == 2
    header.write_text("#define FAKTOR 3\n", encoding="utf-8")
    assert times(folder) == 15 and len(seen) == 2  # the first build is still there
    (made,) = source.folder().glob("times-*")
    for record in made.glob("made-*/made_of.json"):
        module = record.parent / json.loads(record.read_text(encoding="utf-8"))["module"]
        module.write_bytes(module.read_bytes()[:1000])  # damaged
    assert times(folder) == 15 and len(seen) == 3
    assert not list(made.glob("building-*"))


def test_another_python_or_torch_compiles_a_cuda_op_again(folder, monkeypatch):
    from torch.utils import cpp_extension

    places = []
    monkeypatch.setattr(
        cpp_extension, "load", lambda build_directory, **_: places.append(build_directory)
    )
    op = source.SourceOp("twice", ("kernel.cu",))
    for python, version in ((sys.version, "2.9"), (sys.version, "2.10"), ("3.99", "2.10")):
        monkeypatch.setattr(sys, "version", python)
        monkeypatch.setattr(torch, "__version__", version)
        source.load(op)
        source.load(op)
    assert len(places) == 6
    assert places[::2] == places[1::2]
    assert len(set(places)) == 3


def test_flags_and_include_paths_reach_the_compiler(folder, tmp_path):
    shutil.move(folder / "teil", tmp_path / "teil")
    flags = {"include_paths": [str(tmp_path)], "cxx_args": ["-O1", '-DUNUSED="a b$c"', ""]}
    assert times(folder, **flags) == 15


@pytest.mark.skipif(find_spec("ziglang") is None, reason="no zig here")
def test_zig_compiles_it_where_nothing_else_is(folder, monkeypatch):
    zig = [found for found in HERE if found.family == "zig"]
    monkeypatch.setattr(toolchain, "find_compilers", lambda target, named: zig)
    assert times(folder) == 15


def test_the_compilers_words_are_in_the_error(folder):
    (folder / "times.cpp").write_text("int f() { return 5 +; }\n", encoding="utf-8")
    with pytest.raises(SourceOpError, match=r"(?s)times\.cpp.*expected.*\n.*return 5 \+;"):
        builder(folder).load()
    (entry,) = source.folder().iterdir()
    assert [path.name for path in entry.iterdir() if path.name != "lock"] == []


def test_a_module_of_another_name_says_what_was_expected(folder):
    other = PLAIN.replace("TORCH_EXTENSION_NAME", "divide")
    (folder / "times.cpp").write_text(other, encoding="utf-8")
    with pytest.raises(SourceOpError, match=r"PYBIND11_MODULE\(times, m\)"):
        builder(folder).load()


def test_a_missing_compiler_and_ninja_and_file_are_named(folder, monkeypatch):
    gone = builder(folder, files=("nirgends.cpp",))
    assert not gone.is_compatible() and "nirgends.cpp" in gone.error_log
    monkeypatch.setattr(toolchain, "find_compilers", lambda target, named: [])
    mine = builder(folder)
    assert not mine.is_compatible()
    with pytest.raises(RuntimeError, match=r"(?s)times.*C\+\+ compiler.*pip install ziglang"):
        mine.load()
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    with pytest.raises(RuntimeError, match="pip install ninja"):
        mine.load()


def test_a_compiler_that_cannot_be_started_is_named(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SourceOpError, match="no-such-compiler"):
        builder(folder).load()


def test_zig_does_not_compile_for_torch(folder, monkeypatch):
    zig = toolchain.Compiler(tuple(ZIG), "zig")
    monkeypatch.setattr(toolchain, "find_compilers", lambda target, named: [zig])
    (folder / "times.cpp").write_text("#include <torch/extension.h>\n", encoding="utf-8")
    mine = builder(folder)
    assert not mine.is_compatible()
    assert "C++ library of torch" in mine.error_log and "ziglang" in mine.error_log


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(SourceOpError, match="TORCH_EXTENSIONS_DIR"):
        builder(folder).load()


CHILD = """
import sys
from pathlib import Path
from deepspeed.ops.op_builder import OpBuilder, toolchain
real = toolchain.run
def slow(plan, folder, verbose):
    print("builds", flush=True)
    if sys.argv[2] == "hang":
        import time
        time.sleep(600)
    return real(plan, folder, verbose)
toolchain.run = slow
class Mine(OpBuilder):
    NAME = "times"
    def sources(self):
        return [sys.argv[1]]
print("result", Mine().load(verbose=False).times(5), flush=True)
"""


def child(folder, what):
    words = [sys.executable, "-c", CHILD, str(folder / "times.cpp"), what]
    return subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8")


def test_a_killed_builder_is_followed_by_one_of_those_who_waited(folder):
    first = child(folder, "hang")
    assert first.stdout.readline() == "builds\n"
    waiting = [child(folder, "build") for _ in range(2)]
    time.sleep(0.2)
    first.kill()
    first.wait()
    first.stdout.close()
    told = [process.communicate(timeout=120)[0].split() for process in waiting]
    assert sum(words.count("builds") for words in told) == 1  # one compiled, both had it
    assert all(words[-2:] == ["result", "15"] for words in told)
    (entry,) = source.folder().iterdir()
    assert not list(entry.glob("building-*"))  # what the first left is gone


def test_without_locks_it_is_only_compiled_more_often(folder, monkeypatch):
    import filelock

    def refuse(*words, **options):
        raise NotImplementedError("this file system has no locks")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert times(folder) == 15


TORCH_OP = """
#include <ATen/ops/add.h>
#include <torch/csrc/utils/pybind.h>
at::Tensor twice(const at::Tensor &x) {
    if (x.dim() != 1) throw std::runtime_error("one dimension, please");
    return at::add(x, x);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("twice", &twice); }
"""


@pytest.mark.slow
def test_an_op_with_torchs_headers_takes_tensors(folder):
    if not [found for found in HERE if toolchain._shares_torchs_library(found)]:
        pytest.skip("no compiler with torch's C++ library")
    (folder / "twice.cpp").write_text(TORCH_OP, encoding="utf-8")
    twice = builder(folder, "twice", ("twice.cpp",), cxx_args=["-O0"]).load(verbose=False).twice
    x = torch.arange(3.0, requires_grad=True)
    assert twice(x).tolist() == [0.0, 2.0, 4.0]
    twice(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="one dimension, please"):
        twice(torch.ones(2, 2))
    module = OpBuilder._loaded_ops["deepspeed.ops.twice_op"]
    assert Path(module.__file__).is_relative_to(source.folder())


def test_an_op_for_cuda_is_compiled_by_torch_for_the_gpus_that_are_there(monkeypatch):
    from torch.utils import cpp_extension

    from deepspeed.ops.op_builder import CUDAOpBuilder

    class Gpu(CUDAOpBuilder):
        NAME = "gpu"

        def sources(self):
            return [__file__]

        def nvcc_args(self):
            return self.compute_capability_args()

    given = []

    def load(**settings):
        given.append((os.environ["TORCH_CUDA_ARCH_LIST"], settings))
        return "the module"

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 6)].__getitem__)
    builder = Gpu()
    assert builder.jit_load(verbose=False) == "the module"
    listed, settings = given[0]
    assert listed == "8.6;9.0+PTX" and settings["with_cuda"] is True
    assert settings["extra_cuda_cflags"] == ["-DBF16_AVAILABLE"]
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ and not builder.jit_mode
    assert builder.cuda_capability_major() is None  # CUDA is not started to ask
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="before the fork"):
        builder.jit_load(verbose=False)
    assert len(given) == 1


def test_the_helpers_of_builders(monkeypatch):
    from deepspeed.ops.op_builder import CUDAOpBuilder

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # restored at the end

    class Gpu(CUDAOpBuilder):
        NAME = "gpu"

        def filter_ccs(self, ccs):
            return [cc.split(".") for cc in ccs if float(cc[:3]) >= 7]

    assert Gpu().compute_capability_args(["6.0", "8.0", "9.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST"):
        Gpu().compute_capability_args(["6.0"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 8.0+PTX;10.0;8.0")
    assert [flag[-6:] for flag in Gpu().compute_capability_args()] == [
        "=sm_80",
        "ute_80",
        "sm_90a",
        "sm_100",
    ]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0+PTX;9.0a;10.0"
    mine = Gpu()
    mine.validate_torch_version({"version": ".".join(torch.__version__.split(".")[:2])})
    with pytest.raises(RuntimeError, match="another torch"):
        mine.validate_torch_version({"version": "1.5"})
    assert mine.simd_width().startswith("-D__")
    assert not mine.has_function("a_function_that_nobody_has", ["nothing"])
    if sys.platform == "linux" and HERE[0].family == "gnu":
        assert mine.has_function("cos", ["m"])
