# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/ into one shared library with whatever C++ compiler there is; imports the standard library only.

``python -m op_builder.build [--target win_amd64] [--out DIR] [--compiler NAME]`` builds by hand; setup.py calls
`build` while a wheel is made. Files are compiled side by side, each ISA unit with its own flags, which is why
setuptools' own extension command does not do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc"
DEFAULT_OUT = ROOT / "deepspeed" / "ops" / "lib"

COMMON = ("api/error.cpp", "cpu/cpuid.cpp", "cpu/pool.cpp", "cpu/dispatch.cpp")
ENTRIES = (
    "cpu/optim.cpp",
    "cpu/norm.cpp",
    "cpu/crc.cpp",
    "cpu/cast.cpp",
    "cpu/quant.cpp",
    "cpu/fp_quant.cpp",
)
FILES = (
    "io/file_posix.cpp",
    "io/file_windows.cpp",
    "io/sync_engine.cpp",
    "io/uring_engine.cpp",
    "io/iocp_engine.cpp",
    "io/worker.cpp",
    "io/lock.cpp",
    "io/queue.cpp",
    "io/memory.cpp",
    "io/io_api.cpp",
)
# ISA unit -> (GCC and clang flags, MSVC flags), per machine. What is fused is said so: see [Note: same bits everywhere].
UNITS = {
    "x86_64": {
        "scalar": ((), ()),
        "avx2": (("-mavx2", "-mf16c", "-mfma"), ("/arch:AVX2",)),
        "avx512": (
            ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
            ("/arch:AVX512",),
        ),
    },
    "arm64": {"scalar": ((), ()), "neon": ((), ())},
    "other": {"scalar": ((), ())},
}
GNU_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-warning-option",
    "-Wno-maybe-uninitialized",
)
MSVC_FLAGS = ("/nologo", "/std:c++17", "/O2", "/MT", "/fp:precise", "/EHsc", "/W3")


class BuildError(RuntimeError):
    """The library could not be built; the message names the compiler and shows its words."""


def _compilers_module() -> ModuleType:
    """Load the package's table of compilers by its path: importing deepspeed would want torch."""
    path = ROOT / "deepspeed" / "ops" / "op_builder" / "compilers.py"
    spec = spec_from_file_location("_ds_compilers", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_compilers = _compilers_module()
Compiler, Target = _compilers.Compiler, _compilers.Target
native_target, target_of = _compilers.native_target, _compilers.target_of
GLIBC_FLOOR = _compilers.GLIBC_FLOOR
LIBRARIES = tuple(_compilers.LIBRARY_NAMES.values())


def find_compilers(target: Target) -> list[Compiler]:
    """Return the compilers of this machine that can build for the target, best first."""
    return _compilers.find_compilers(target, os.environ.get("CXX"))


def build(out: Path = DEFAULT_OUT, target: Target | None = None, compiler: str = "") -> Path:
    """Build the library into `out` beside a record of the build (build.json); returns its path.

    The first compiler that succeeds wins. `compiler` keeps only those whose name contains it.

    Raises:
        BuildError: there is none, or none succeeded. The record then holds the reason.
    """
    target = target or native_target()
    out.mkdir(parents=True, exist_ok=True)
    problems = []
    for candidate in find_compilers(target):
        if compiler not in candidate.name:
            continue
        try:
            library = _build_with(candidate, target, out)
        except BuildError as error:
            problems.append(str(error))
            continue
        units = sorted(UNITS[target.machine])
        told = candidate.name.replace(
            sys.executable, "python"
        )  # a path of this machine says nothing
        _record(out, compiler=told, target=target.tag, units=units)
        return library
    problem = "\n".join(problems) or (
        "no C++ compiler was found (looked for cl, clang++, g++ and the ziglang package)"
    )
    (out / target.library).unlink(missing_ok=True)
    _record(out, problem=problem, target=target.tag)
    raise BuildError(problem)


def compile_unit(compiler: Compiler, target: Target, source: str, flags: tuple[str, ...]) -> list:
    """Return the command that compiles one file of csrc/; the caller appends the output's name."""
    words = [*compiler.words]
    if compiler.family == "msvc":
        return [*words, *MSVC_FLAGS, *flags, "/c", str(SOURCE / source)]
    if compiler.family == "zig":
        # Without a target zig compiles for the very CPU it runs on. Its checks need a run time of its own.
        words += ["-target", target.zig, "-fno-sanitize=all"]
    words += [*GNU_FLAGS, *flags]
    if target.system != "windows":
        words.append("-fPIC")
    elif compiler.family == "gnu" and "mingw" in compiler.name:
        # GCC for Windows aligns the stack to 16 bytes but spills wide registers with aligned moves (GCC bug 54412).
        words.append("-Wa,-muse-unaligned-vector-move")
    return [*words, "-c", str(SOURCE / source)]


def _build_with(compiler: Compiler, target: Target, out: Path) -> Path:
    msvc = compiler.family == "msvc"
    sources = (*COMMON, *ENTRIES, *FILES)
    jobs: list[tuple[str, tuple[str, ...]]] = [(source, ()) for source in sources]
    for unit, (gnu_flags, msvc_flags) in UNITS[target.machine].items():
        jobs.append((f"cpu/isa_{unit}.cpp", msvc_flags if msvc else gnu_flags))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:

        def compile_one(job: tuple[str, tuple[str, ...]]) -> str:
            item = str(Path(folder) / (Path(job[0]).stem + (".obj" if msvc else ".o")))
            command = compile_unit(compiler, target, *job)
            _run([*command, f"/Fo{item}"] if msvc else [*command, "-o", item], folder)
            return item

        objects = list(threads.map(compile_one, jobs))
        # Linked aside and moved, so that no process ever loads half a library.
        made = Path(folder) / target.library
        _run(_link_command(compiler, target, objects, made), folder)
        _check(made, target, folder)
        final = out / target.library
        final.unlink(missing_ok=True)
        shutil.copyfile(made, final)
    return final


def _check(made: Path, target: Target, folder: str) -> None:
    """Refuse what no process could load, before it reaches the package."""
    if target.tag == native_target().tag:
        _run([sys.executable, "-c", _LOADS, str(made)], folder)
    elif made.read_bytes()[:4].lstrip(b"\x7f")[:2] not in (b"MZ", b"EL", b"\xcf\xfa"):
        raise BuildError(f"the linker's output for {target.tag} is not a shared library")


_LOADS = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).ds_abi_version()"


def _link_command(compiler: Compiler, target: Target, objects: list[str], made: Path) -> list[str]:
    if compiler.family == "msvc":
        return [*compiler.words, "/nologo", "/LD", "/MT", *objects, f"/Fe{made}"]
    words = [*compiler.words]
    if compiler.family == "zig":
        words += ["-target", target.zig, "-fno-sanitize=all"]
    words += ["-shared", "-o", str(made), *objects]
    if target.system == "windows":
        # Nothing of the compiler's own is to be shipped beside the library; for zig that goes without saying, and
        # "-static" would make an archive.
        return [*words, "-s"] if compiler.family == "zig" else [*words, "-static", "-s"]
    if target.system == "darwin":
        return words
    words += ["-pthread", "-Wl,-z,relro,-z,now", "-s"]
    if compiler.family == "gnu" and "clang" not in compiler.name:
        words += ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    return words


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    if done.returncode:
        words = (done.stdout + done.stderr).strip()[-2000:]
        raise BuildError(f"{' '.join(command[:4])} ... failed with {done.returncode}:\n{words}")


def _record(out: Path, **facts: object) -> None:
    text = json.dumps(facts, indent=1)
    (out / "build.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> int:
    """Build from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m op_builder.build", description=__doc__)
    parser.add_argument("--target", help="platform tag, e.g. win_amd64; default: this machine's")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the library")
    parser.add_argument("--compiler", default="", help="use only compilers whose name has this")
    args = parser.parse_args(argv)
    try:
        library = build(
            args.out.resolve(), target_of(args.target) if args.target else None, args.compiler
        )
    except BuildError as error:
        print(f"build failed: {error}", file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
