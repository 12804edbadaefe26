# SPDX-License-Identifier: Apache-2.0
"""How one C++ op becomes a Python module: the compiler, its flags, what to link, and ninja to run it all.

[Note: whose C++ library]
A module of pybind11 alone may be made by any compiler: nothing of C++ passes its borders. One that calls torch
exchanges C++ objects with it and so needs the C++ library that torch was built with: zig brings another one, and on
Windows so does MinGW.
"""

from __future__ import annotations

import importlib.util
import json
import locale
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from deepspeed.ops.op_builder.compilers import Compiler, find_compilers, native_target
from deepspeed.utils import env
from deepspeed.utils.command_line import as_typed
from deepspeed.utils.errors import DeepSpeedError, explain

if TYPE_CHECKING:
    from deepspeed.ops.op_builder.source import SourceOp

_TORCH = Path(torch.__file__).resolve().parent
_TORCH_LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")
# the newest torch headers are written in it
_CXX20 = (2, 12)
_SHOWN = 6000  # characters of a compiler's words in a message


class SourceOpError(DeepSpeedError, RuntimeError):
    """A user's op cannot be compiled or imported; the message holds the cause and the cure."""


class Plan(NamedTuple):
    """The commands that make a module, to be run in an empty folder.

    Attributes:
        op: what is made.
        compiler: its words, for messages.
        module: file name of the module.
        compile: one command for each source; it leaves ``<number>.obj`` and the list of what it read, ``<number>.d``.
        link: the command that leaves the module.
    """

    op: SourceOp
    compiler: str
    module: str
    compile: tuple[tuple[str, ...], ...]
    link: tuple[str, ...]

    def settings(self) -> list[object]:
        """Return what the module depends on besides the content of files."""
        return [self.compile, self.link, *versions()]


def versions() -> list[str]:
    """Return what every module is compiled against: this Python and this torch."""
    return [sys.version, torch.__version__]


def ninja() -> str:
    """Return the path of ninja, of its package or of the system.

    Raises:
        SourceOpError: there is none.
    """
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        inside = shutil.which("ninja", path=str(package.BIN_DIR))
        if inside is not None:
            return inside
    found = shutil.which("ninja")
    if found is None:
        raise SourceOpError(
            explain("a C++ op cannot be compiled without ninja", fix="pip install ninja")
        )
    return found


def compiler_for(with_torch: bool) -> Compiler:
    """Return the compiler to use: CXX, else the best that is installed. See [Note: whose C++ library].

    Raises:
        SourceOpError: there is none that can make such a module.
    """
    target = native_target()
    found = find_compilers(target, env.CXX.get() or None)
    fit = [compiler for compiler in found if not with_torch or _shares_torchs_library(compiler)]
    if fit:
        return fit[0]
    windows = target.system == "windows"
    wanted = "cl (MSVC) or clang-cl" if windows else "g++ or clang++"
    if found:
        unfit = ", ".join(compiler.name for compiler in found)
        raise SourceOpError(
            explain(
                "an op that includes torch's headers needs a compiler with the C++ library of torch",
                got=unfit,
                expected=wanted,
                fix=f"Install {wanted}, or write the op with pybind11 alone (numpy arrays, pointers).",
            )
        )
    tools = ' in the "x64 Native Tools" prompt of Visual Studio' if windows else ""
    any_other = "" if with_torch else ", or pip install ziglang, which needs nothing else"
    raise SourceOpError(
        explain(
            "a C++ op cannot be compiled without a C++ compiler",
            got="neither cl, clang-cl, clang++, g++ nor the package ziglang; CXX is unset",
            fix=f"Install {wanted} and start Python{tools} where it is on the PATH{any_other}.",
        )
    )


def _shares_torchs_library(compiler: Compiler) -> bool:
    if compiler.family != "gnu" or sys.platform != "win32":
        return compiler.family != "zig"
    return _is_clang_of_msvc(compiler)


def _is_clang_of_msvc(compiler: Compiler) -> bool:
    """Whether it is clang with the flags of GCC and the libraries of Microsoft."""
    windows = sys.platform == "win32" and compiler.family == "gnu"
    return windows and "msvc" in _words_of([*compiler.words, "-dumpmachine"])


def _words_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        return str(error)
    return done.stdout + done.stderr


def plan(op: SourceOp) -> Plan:
    """Return the commands that make a module.

    Raises:
        SourceOpError: there is no compiler for it.
    """
    with_torch = op.uses_torch()
    compiler = compiler_for(with_torch)
    module = op.name + str(sysconfig.get_config_var("EXT_SUFFIX"))
    describe = _for_msvc if compiler.family == "msvc" else _for_gnu
    return describe(op, compiler, module, with_torch)


def _headers(with_torch: bool) -> list[str]:
    paths = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    if with_torch:
        # torch's copy of pybind11 comes first: both must agree on the layout of what they share
        paths = [str(_TORCH / "include"), *_old_torch_api(), *paths]
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        paths.append(pybind11.get_include())
    return list(dict.fromkeys(path for path in paths if path))


def _old_torch_api() -> list[str]:
    path = _TORCH / "include" / "torch" / "csrc" / "api" / "include"
    return [str(path)] if path.is_dir() else []


def _defines(op: SourceOp, with_torch: bool) -> list[str]:
    """Macros as torch's own loader sets them."""
    found = [f"TORCH_EXTENSION_NAME={op.name}"]
    if with_torch:
        found.append("TORCH_API_INCLUDE_EXTENSION_H")
        for name in ("COMPILER_TYPE", "STDLIB", "BUILD_ABI"):
            value = getattr(torch._C, f"_PYBIND11_{name}", None)
            found += [f'PYBIND11_{name}="{value}"'] if value is not None else []
        if sys.platform == "linux":
            found.append(f"_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    return found


def _standard(with_torch: bool) -> str:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    return "c++20" if with_torch and version >= _CXX20 else "c++17"


def _for_gnu(op: SourceOp, compiler: Compiler, module: str, with_torch: bool) -> Plan:
    target = native_target()
    words = [*compiler.words]
    if compiler.family == "zig":
        # Without a target zig compiles for the very CPU it runs on, and others may share the cache. Its checks need
        # a run time of their own.
        words += ["-target", target.zig, "-fno-sanitize=all"]
    flags = [f"-std={_standard(with_torch)}", "-O2", "-fvisibility=hidden"]
    flags += [] if target.system == "windows" else ["-fPIC"]
    of_msvc = _is_clang_of_msvc(compiler)
    flags += ["-fms-runtime-lib=dll"] if of_msvc else []  # as Python and torch have it
    flags += [f"-D{define}" for define in _defines(op, with_torch)]
    flags += [f"-I{path}" for path in op.include_paths]
    # as headers of the system: their warnings are nobody's, and the list of what was read leaves them out
    flags += [word for path in _headers(with_torch) for word in ("-isystem", path)]
    commands = tuple(
        (*words, *flags, *op.flags, "-MMD", "-MF", f"{i}.d", "-c", source, "-o", f"{i}.obj")
        for i, source in enumerate(op.sources)
    )
    shape = (
        ["-bundle", "-undefined", "dynamic_lookup"] if target.system == "darwin" else ["-shared"]
    )
    link = [*words, *shape, "-o", module, *(f"{i}.obj" for i in range(len(op.sources)))]
    link += [f"-L{_TORCH / 'lib'}", *(f"-l{n}" for n in _TORCH_LIBRARIES)] if with_torch else []
    link += [*op.link_flags, *(f"-l{name}" for name in op.libraries)]
    if target.system == "windows":
        link += _python_library(op)
        # nothing of MinGW's own is to be found beside the module
        link += ["-static"] if compiler.family == "gnu" and not of_msvc else []
    return Plan(op, compiler.name, module, commands, tuple(link))


def _python_library(op: SourceOp) -> list[str]:
    """What a module on Windows links Python by: its import library, or for some linkers the DLL itself."""
    name = f"python{sys.version_info[0]}{sys.version_info[1]}"
    if any(name in flag for flag in op.link_flags):
        return []
    base = Path(sys.base_prefix)
    places = [base / "libs" / f"{name}.lib", base / "libs" / f"lib{name}.a", base / f"{name}.dll"]
    return [str(place) for place in places if place.exists()][:1]


def _for_msvc(op: SourceOp, compiler: Compiler, module: str, with_torch: bool) -> Plan:
    reads = "/sourceDependencies{0}.d"
    if "clang-cl" in compiler.name:
        reads = "/clang:-MD /clang:-MF{0}.d"
    flags = ["/nologo", f"/std:{_standard(with_torch)}", "/O2", "/MD", "/EHsc", "/utf-8"]
    flags += ["/wd4251", "/wd4275"] if with_torch else []
    flags += [f"/D{define}" for define in _defines(op, with_torch)]
    flags += [f"/I{path}" for path in (*op.include_paths, *_headers(with_torch))]
    commands = tuple(
        (*compiler.words, *flags, *op.flags, *reads.format(i).split(), "/c", source, f"/Fo{i}.obj")
        for i, source in enumerate(op.sources)
    )
    link = [*compiler.words, "/nologo", "/LD", *(f"{i}.obj" for i in range(len(op.sources)))]
    link += [f"/Fe{module}", "/link", f"/LIBPATH:{Path(sys.base_prefix) / 'libs'}"]
    if with_torch:
        link.append(f"/LIBPATH:{_TORCH / 'lib'}")
    libraries = (*op.libraries, *(_TORCH_LIBRARIES if with_torch else ()))
    link += [*op.link_flags, *(f"{name}.lib" for name in libraries)]
    return Plan(op, compiler.name, module, commands, tuple(link))


def run(plan: Plan, folder: Path, verbose: bool) -> list[Path]:
    """Compile and link in a folder; returns the user's files that went into the module.

    Raises:
        SourceOpError: a command fails; the message has its words.
    """
    (folder / "build.ninja").write_text(_ninja_file(plan), encoding="utf-8", newline="\n")
    command = [ninja(), "-v"] if verbose else [ninja(), "--quiet"]
    try:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise SourceOpError(explain("ninja cannot be started", got=str(error))) from error
    words = _decoded(done.stdout).strip()
    if done.returncode or not (folder / plan.module).exists():
        raise SourceOpError(
            explain(
                f"the op {plan.op.name} was not compiled: {plan.compiler} stopped with\n"
                f"{_excerpt(words)}\n",
                fix="Correct the sources, or the flags and libraries that the builder names.",
            )
        )
    if verbose and words:
        print(words)
    return _files_read(plan, folder)


def _decoded(output: bytes) -> str:
    """Text of compilers: UTF-8, but for some on Windows the code page of the system."""
    try:
        return output.decode("utf-8")
    except UnicodeDecodeError:
        return output.decode(locale.getpreferredencoding(False), errors="replace")


def _excerpt(words: str) -> str:
    """The first errors are the cause; the last lines say which command it was."""
    if len(words) <= _SHOWN:
        return words
    return f"{words[: _SHOWN * 2 // 3]}\n...\n{words[-_SHOWN // 3 :]}"


def _ninja_file(plan: Plan) -> str:
    lines = ["rule run", "  command = $words", "  description = $out"]
    for i, words in enumerate(plan.compile):
        lines += [f"build {i}.obj: run", f"  words = {_quoted(words)}"]
    objects = " ".join(f"{i}.obj" for i in range(len(plan.compile)))
    lines += [f"build {plan.module}: run | {objects}", f"  words = {_quoted(plan.link)}"]
    return "\n".join([*lines, f"default {plan.module}", ""])


def _quoted(words: tuple[str, ...]) -> str:
    return as_typed(words).replace("$", "$$")


def _files_read(plan: Plan, folder: Path) -> list[Path]:
    """Return the sources and those of the headers that lie in the user's folders."""
    homes = [Path(source).resolve().parent for source in plan.op.sources]
    homes += [Path(path).resolve() for path in plan.op.include_paths]
    found = [Path(source).resolve() for source in plan.op.sources]
    for i in range(len(plan.op.sources)):
        text = (folder / f"{i}.d").read_text(encoding="utf-8", errors="replace")
        for name in _names_in(text):
            path = (folder / name).resolve()
            if path.is_file() and any(home in path.parents for home in homes):
                found.append(path)
    return list(dict.fromkeys(found))


def _names_in(text: str) -> list[str]:
    """File names in a compiler's list: JSON of cl, a rule for make of all others."""
    if text.lstrip().startswith("{"):
        data = json.loads(text)["Data"]
        return [data["Source"], *data["Includes"]]
    joined = re.sub(r"\\\r?\n", " ", text).partition(": ")[2]
    names = re.split(r"(?<!\\)\s+", joined.strip())
    return [name.replace("\\ ", " ").replace("\\#", "#").replace("$$", "$") for name in names]
