# SPDX-License-Identifier: Apache-2.0
"""The source tree as the structure tests see it: parsed modules, their imports, their functions."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "deepspeed"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One parsed Python file of the package."""

    name: str
    path: Path
    source: str
    tree: ast.Module

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    """All .py files below the named folders (or those files), sorted; caches and build outputs left out."""
    found: list[Path] = []
    for folder in folders:
        top = ROOT / folder
        candidates = [top] if top.is_file() else top.rglob("*.py")
        found += [path for path in candidates if "__pycache__" not in path.parts]
    return sorted(found)


@functools.cache
def package() -> dict[str, Module]:
    """Dotted name -> module, for every module of the package."""
    modules = {}
    for path in python_files("deepspeed"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, source, ast.parse(source, filename=str(path)))
    return modules


def _type_checking_lines(tree: ast.Module) -> set[int]:
    """Line numbers inside `if TYPE_CHECKING:` blocks, whose imports never run."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                lines.update(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    return lines


def _from_targets(module: Module, node: ast.ImportFrom) -> Iterator[str]:
    """Modules that a `from x import a, b` loads: x.a where that is a module, else x itself."""
    base = node.module or ""
    if node.level:
        package_parts = module.name.split(".")
        if module.path.name != "__init__.py":
            package_parts = package_parts[:-1]
        package_parts = package_parts[: len(package_parts) - node.level + 1]
        base = ".".join([*package_parts, base]) if base else ".".join(package_parts)
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        yield submodule if submodule in package() else exported(base, alias.name)


@functools.cache
def lazy_table(door: str) -> dict[str, str]:
    """Exported name -> module that a lazy package door would load, read off its `{module: [names]}` literals."""
    table: dict[str, str] = {}
    module = package().get(door)
    if module is None or module.path.name != "__init__.py":
        return table
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, (ast.List, ast.Tuple)):
                    name = str(key.value)
                    name = door + name if name.startswith(".") else name
                    names = [item.value for item in value.elts if isinstance(item, ast.Constant)]
                    table.update({str(exported): name for exported in names if name in package()})
    return table


def exported(door: str, name: str) -> str:
    """The module behind `from door import name`: through the door's lazy table, else the door itself."""
    return lazy_table(door).get(name, door)


def imports(module: Module) -> list[tuple[str, int]]:
    """(package module, line) for each import in the file, at any depth, type-checking blocks left out."""
    skip = _type_checking_lines(module.tree)
    found: list[tuple[str, int]] = []
    for node in ast.walk(module.tree):
        if getattr(node, "lineno", 0) in skip:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(name, node.lineno) for name in _from_targets(module, node)]
    return [(name, line) for name, line in found if name.split(".")[0] == "deepspeed"]


def functions(
    tree: ast.AST, owner: str = ""
) -> Iterator[tuple[str, FunctionNode, ast.ClassDef | None]]:
    """(qualified name, node, enclosing class) of each function outside other functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FunctionNode):
            yield owner + node.name, node, tree if isinstance(tree, ast.ClassDef) else None
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{owner}{node.name}.")
        elif not isinstance(node, ast.expr):
            yield from functions(node, owner)


def dotted(node: ast.AST) -> str:
    """`a.b.c` as it is written; empty for anything but a name and its attributes."""
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    """What a call gives for a keyword."""
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_public(qualified: str) -> bool:
    """True where no part of the dotted name starts with an underscore (dunders count as private)."""
    return not any(part.startswith("_") for part in qualified.split("."))


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles: the components of more than one module, or a module that imports itself (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1 or node in graph.get(node, ()):
                cycles.append(sorted(component))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return cycles
