# SPDX-License-Identifier: Apache-2.0
"""The form of the source: sizes, words, annotations, and the calls that do not work everywhere."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from tests.structure import allowed, layers, tree

FILE_LINES, FILE_HARD = 500, 700
FUNCTION_LINES, FUNCTION_HARD = 60, 90
PUBLIC_METHODS = 25
PARAMS = 8

SOURCES = (
    "deepspeed",
    "op_builder",
    "setup.py",
    "quickstart.py",
    "examples",
    "benchmarks",
    "tests",
)
DOCUMENTED_LAYERS = range(0, 4)


def package_functions():
    for module in tree.package().values():
        for name, node, owner in tree.functions(module.tree):
            yield module, name, node, owner


def test_files_are_one_thought_long():
    too_long = {}
    for path in tree.python_files(*SOURCES):
        where = path.relative_to(tree.ROOT).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (FILE_HARD if where in allowed.LONG_FILES else FILE_LINES):
            too_long[where] = lines
    assert not too_long, f"over {FILE_LINES} lines, split by thought: {too_long}"


def test_functions_are_short():
    too_long = {}
    for module, name, node, _ in package_functions():
        key = f"{module.where}:{name}"
        lines = node.end_lineno - node.lineno + 1
        if lines > (FUNCTION_HARD if key in allowed.LONG_FUNCTIONS else FUNCTION_LINES):
            too_long[key] = lines
    assert not too_long, f"over {FUNCTION_LINES} lines: {too_long}"


def test_classes_have_few_public_methods():
    too_many = {}
    for module in tree.package().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                methods = [
                    child.name
                    for child in node.body
                    if isinstance(child, tree.FunctionNode) and not child.name.startswith("_")
                ]
                key = f"{module.where}:{node.name}"
                if len(set(methods)) > PUBLIC_METHODS and key not in allowed.WIDE_CLASSES:
                    too_many[key] = len(set(methods))
    assert not too_many, too_many


def test_functions_take_few_params():
    too_many = {}
    for module, name, node, owner in package_functions():
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(args) - (owner is not None and bool(args) and args[0].arg in ("self", "cls"))
        key = f"{module.where}:{name}"
        if count > PARAMS and key not in allowed.WIDE_SIGNATURES:
            too_many[key] = count
    assert not too_many, f"over {PARAMS} params, use a frozen dataclass: {too_many}"


def test_allow_lists_name_only_what_exists():
    functions = {f"{module.where}:{name}" for module, name, _, _ in package_functions()}
    classes = {
        f"{module.where}:{node.name}"
        for module in tree.package().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    files = {path.relative_to(tree.ROOT).as_posix() for path in tree.python_files(*SOURCES)}
    stale = set(allowed.LONG_FUNCTIONS) | set(allowed.WIDE_SIGNATURES)
    stale = (
        (stale - functions)
        | (set(allowed.WIDE_CLASSES) - classes)
        | (set(allowed.LONG_FILES) - files)
    )
    assert not stale, sorted(stale)


def native_sources():
    return [
        p
        for p in sorted((tree.ROOT / "csrc").rglob("*"))
        if p.suffix in (".c", ".cpp", ".h", ".inl", ".cu", ".cuh")
    ]


def test_each_source_names_its_licence_in_the_first_lines():
    missing = [
        str(path.relative_to(tree.ROOT))
        for path in [*tree.python_files(*SOURCES), *native_sources()]
        if "SPDX-License-Identifier: Apache-2.0"
        not in "\n".join(path.read_text(encoding="utf-8").splitlines()[:2])
    ]
    assert not missing, missing


def test_no_postponed_work_in_the_source():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [
        f"{path.relative_to(tree.ROOT)}:{number}"
        for path in [*tree.python_files(*SOURCES), *native_sources()]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not found, f"file an issue instead: {found}"


def test_modules_say_what_they_are():
    silent = [
        module.where
        for module in tree.package().values()
        if module.tree.body and ast.get_docstring(module.tree) is None
    ]
    assert not silent, silent


def test_every_function_is_annotated():
    bare = []
    for module, name, node, owner in package_functions():
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        args += [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
        first = 1 if owner is not None and args and args[0].arg in ("self", "cls") else 0
        if node.returns is None or any(arg.annotation is None for arg in args[first:]):
            bare.append(f"{module.where}:{node.lineno}: {name}")
    assert not bare, "\n".join(bare)


@functools.cache
def documented_methods() -> set[tuple[str, str]]:
    """(class name, method name) of each documented method in the package."""
    return {
        (node.name, child.name)
        for module in tree.package().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
        if isinstance(child, tree.FunctionNode) and ast.get_docstring(child) is not None
    }


def documented_above(module: tree.Module, owner: ast.ClassDef | None, name: str) -> bool:
    """True where a base class (by its name), or the public function that a class serves, documents it."""
    if owner is None:
        return False
    bases = {ast.unparse(base).rpartition(".")[2] for base in owner.bases}
    elsewhere = f"{module.where}:{owner.name}" in allowed.DOCUMENTED_ELSEWHERE
    return elsewhere or any((base, name) in documented_methods() for base in bases)


def test_public_names_of_the_lower_layers_are_documented():
    silent = []
    for module in tree.package().values():
        if layers.layer_of(module.name) not in DOCUMENTED_LAYERS:
            continue
        named = [*tree.functions(module.tree)]
        named += [
            (node.name, node, None) for node in module.tree.body if isinstance(node, ast.ClassDef)
        ]
        silent += [
            f"{module.where}:{node.lineno}: {name}"
            for name, node, owner in named
            if tree.is_public(name)
            and ast.get_docstring(node) is None
            and not documented_above(module, owner, node.name)
        ]
    assert not silent, "\n".join(silent)


def test_no_assert_judges_a_public_argument():
    found = []
    for module, name, node, _ in package_functions():
        if not tree.is_public(name):
            continue
        params = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)} - {
            "self",
            "cls",
        }
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assert):
                read = {leaf.id for leaf in ast.walk(inner.test) if isinstance(leaf, ast.Name)}
                if read & params:
                    found.append(f"{module.where}:{inner.lineno}: {name}")
    assert not found, f"raise with what, got, expected, fix: {found}"


def test_only_one_module_reads_the_environment():
    found = [
        f"{module.where}:{node.lineno}"
        for module in tree.package().values()
        if module.name != "deepspeed.utils.env" and not module.name.startswith("deepspeed.launcher")
        for node in ast.walk(module.tree)
        if tree.dotted(node) in ("os.environ", "os.getenv", "os.putenv", "os.unsetenv")
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(a.name == "environ" for a in node.names)
        )
    ]
    assert not found, f"declare the variable in deepspeed/utils/env.py: {found}"


def opens_text_without_encoding(call: ast.Call) -> bool:
    called = tree.dotted(call.func) or (
        call.func.attr if isinstance(call.func, ast.Attribute) else ""
    )
    last = called.rpartition(".")[2]
    if tree.keyword(call, "encoding") is not None or any(k.arg is None for k in call.keywords):
        return False
    if last in ("read_text", "write_text"):
        return len(call.args) < (1 if last == "read_text" else 2)
    if called in ("os.open", "webbrowser.open", "tarfile.open") or last not in (
        "open",
        "fdopen",
        "NamedTemporaryFile",
    ):
        return False
    positions = {
        "open": 1 if called in ("open", "io.open") else 0,
        "fdopen": 1,
        "NamedTemporaryFile": 0,
    }
    default = "w+b" if last == "NamedTemporaryFile" else "r"
    given = call.args[positions[last] :]
    mode = tree.keyword(call, "mode") or (given[0] if given else ast.Constant(default))
    words = [leaf.value for leaf in ast.walk(mode) if isinstance(leaf, ast.Constant)]
    modes = [word for word in words if isinstance(word, str)]
    return any("b" not in word for word in modes)


def test_text_files_are_opened_as_utf8():
    found = [
        f"{path.relative_to(tree.ROOT)}:{node.lineno}"
        for path in tree.python_files(*SOURCES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_without_encoding(node)
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("open(p)", True),
        ("open(p, 'rb')", False),
        ("open(p, mode='w')", True),
        ("open(p, 'w', encoding='utf-8')", False),
        ("path.open('ab')", False),
        ("path.open()", True),
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("tempfile.NamedTemporaryFile()", False),
        ("os.open(p, flags)", False),
    ],
)
def test_the_encoding_gate_sees(code, bad):
    assert opens_text_without_encoding(ast.parse(code).body[0].value) is bad


POSIX_ONLY_CALLS = {
    "os.fork",
    "os.symlink",
    "os.getuid",
    "os.setsid",
    "os.killpg",
    "os.system",
    "os.popen",
}
POSIX_ONLY_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}


def not_portable(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        shell = tree.keyword(node, "shell")
        return tree.dotted(node.func) in POSIX_ONLY_CALLS or (
            isinstance(shell, ast.Constant) and shell.value is True
        )
    if isinstance(node, ast.Import):
        return any(alias.name in POSIX_ONLY_MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module in POSIX_ONLY_MODULES
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("/tmp")
    )


def test_nothing_is_written_for_one_operating_system():
    found = [
        f"{module.where}:{node.lineno}"
        for module in tree.package().values()
        for node in ast.walk(module.tree)
        if not_portable(node) and f"{module.where}" not in allowed.GUARDED_POSIX
    ]
    assert not found, found


def test_each_cited_note_exists_once():
    titled, cited = [], []
    for path in [*tree.python_files("deepspeed", "op_builder", "tests/windows"), *native_sources()]:
        for line in path.read_text(encoding="utf-8").splitlines():
            alone = r"\s*$" if path.suffix == ".py" else ""
            match = re.match(r"^[\s#/*\"]*\[Note: ([^\]]+)\]" + alone, line)
            titled += [match[1]] if match else []
            cited += [] if match else re.findall(r"\[Note: ([^\]]+)\]", line)
    assert sorted(titled) == sorted(set(titled)), "a note's title must be unique"
    assert set(cited) <= set(titled), sorted(set(cited) - set(titled))
