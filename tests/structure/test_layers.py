# SPDX-License-Identifier: Apache-2.0
"""Imports go down only and never in a circle: the gate behind the table in layers.py."""

from __future__ import annotations

import ast

from tests.structure import layers, tree


def test_every_module_has_a_layer():
    homeless = [name for name in tree.package() if layers.layer_of(name) is None]
    assert not homeless, f"no row of LAYERS covers {homeless}; add one in tests/structure/layers.py"


def test_every_row_still_names_something():
    names = tree.package()
    stale = [
        row
        for row in layers.LAYERS
        if row not in names
        and not any(name.startswith((row + ".", row.rstrip("*"))) for name in names)
    ]
    assert sorted(set(stale) - layers.PLANNED) == []


def test_imports_go_down_only():
    upward = []
    for module in tree.package().values():
        own = layers.layer_of(module.name)
        for name, line in tree.imports(module):
            other = layers.layer_of(name)
            if own is not None and other is not None and other > own:
                upward.append(f"{module.where}:{line}: layer {own} imports {name} of layer {other}")
    assert not upward, "\n".join(upward)


def test_no_inner_module_imports_the_top_door():
    offenders = [
        f"{module.where}:{line}"
        for module in tree.package().values()
        for name, line in tree.imports(module)
        if name == "deepspeed" and layers.layer_of(module.name) != 7
    ]
    assert not offenders, offenders


def test_no_import_cycles():
    graph = {
        module.name: {name for name, _ in tree.imports(module) if name != module.name}
        for module in tree.package().values()
    }
    assert tree.strongly_connected(graph) == []


def test_pure_modules_import_neither_torch_nor_the_package():
    impure = []
    for name in layers.PURE:
        module = tree.package().get(name)
        for node in ast.walk(module.tree) if module else ():
            if isinstance(node, ast.Import):
                roots = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                roots = [(node.module or "").split(".")[0] if not node.level else "deepspeed"]
            else:
                continue
            impure += [
                f"{name}:{node.lineno}: {root}" for root in roots if root in ("torch", "deepspeed")
            ]
    assert not impure, impure


def test_a_cycle_is_found():
    assert tree.strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
        ["a", "b", "c"]
    ]


def test_longest_prefix_decides():
    assert layers.layer_of("deepspeed.runtime.zero.layout") == 2
    assert layers.layer_of("deepspeed.runtime.zero.offload_config") == 1
    assert layers.layer_of("deepspeed.moe.config") == 1
    assert layers.layer_of("deepspeed.runtime.config_batch") == 1
    assert layers.layer_of("deepspeed.nowhere") is None
