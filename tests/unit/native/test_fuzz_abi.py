# SPDX-License-Identifier: Apache-2.0
"""The C ABI under odd arguments, with address and undefined-behaviour sanitizers on: refused in words, or served."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from op_builder import abi, build

PROGRAM = Path(__file__).with_name("fuzz_abi.cpp")
ROUNDS = 3000
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
DECLARED = re.compile(r"DS_EXPORT int (ds_\w+)\((?:const )?(ds_\w+_args) \*\w+\);")


def table() -> str:
    """C text of every function that takes one struct, with the struct's fields."""
    functions = DECLARED.findall(abi.HEADER.read_text(encoding="utf-8"))
    lines, rows = [], []
    for struct in sorted({struct for _, struct in functions}):
        _, fields = abi.STRUCTS[struct]
        items = [
            f'{{"{f.name}", k{f.kind.capitalize()}, offsetof({struct}, {f.name})}}' for f in fields
        ]
        lines.append(f"const Field fields_{struct}[] = {{{', '.join(items)}}};")
    for name, struct in functions:
        lines.append(f"int call_{name}(void *args) {{ return {name}(({struct} *)args); }}")
        rows.append(
            f'{{"{name}", call_{name}, sizeof({struct}), fields_{struct}, {len(abi.STRUCTS[struct][1])}}}'
        )
    lines += [f"const Entry kEntries[] = {{{', '.join(rows)}}};"]
    return "\n".join([*lines, f"enum {{ kEntryCount = {len(rows)} }};", ""])


def sanitizing_compiler() -> build.Compiler | None:
    for name in ("g++", "clang++"):
        if shutil.which(name) is not None:
            return build.Compiler((name,), "gnu")
    return None


def compiled(folder: Path, compiler: build.Compiler) -> Path:
    target = build.native_target()
    (folder / "fuzz_table.inc").write_text(table(), encoding="utf-8")
    jobs = [(name, FLAGS) for name in (*build.COMMON, *build.ENTRIES, *build.FILES)]
    jobs.append((str(PROGRAM), (f"-I{folder}", *FLAGS)))
    # the kernels check no arguments and take long to compile; they have a sanitized test of their own
    units = build.UNITS[target.machine].items()
    jobs += [(f"cpu/isa_{unit}.cpp", (*flags, "-O0")) for unit, (flags, _) in units]

    def compile_one(job: tuple[str, tuple[str, ...]]) -> str:
        item = str(folder / (Path(job[0]).stem + ".o"))
        command = build.compile_unit(compiler, target, *job)
        subprocess.run([*command, "-o", item], check=True, cwd=folder)
        return item

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, jobs))
    made = folder / "fuzz_abi"
    link = [*compiler.words, *FLAGS, *objects, "-pthread", "-o", str(made)]
    subprocess.run(link, check=True, cwd=folder)
    return made


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers of Linux")
def test_no_argument_does_worse_than_fail_in_words(tmp_path):
    compiler = sanitizing_compiler()
    if compiler is None:
        pytest.skip("neither g++ nor clang++ here")
    made = compiled(tmp_path, compiler)
    words = [str(made), str(ROUNDS), str(tmp_path / "file.bin"), str(tmp_path / "no" / "file")]
    settings = {
        "ASAN_OPTIONS": "allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env={**os.environ, **settings}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    told = dict(re.findall(r"^(\w+): (\d+) of", done.stdout, re.MULTILINE))
    assert len(told) == len(DECLARED.findall(abi.HEADER.read_text(encoding="utf-8")))
    # each served some calls, so it was not the first check that ended them all
    assert all(int(count) > 0 for count in told.values()), told
