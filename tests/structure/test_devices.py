# SPDX-License-Identifier: Apache-2.0
"""New tensors name their device: a script may set another default, and native code reads the CPU's addresses."""

from __future__ import annotations

import ast

import pytest

from tests.structure import allowed, tree

MAKERS = {
    *("torch.empty", "torch.empty_strided", "torch.zeros", "torch.ones", "torch.full", "torch.eye"),
    *("torch.tensor", "torch.arange", "torch.linspace", "torch.normal"),
    *("torch.rand", "torch.randn", "torch.randint", "torch.randperm"),
}


def lacks_device(node: ast.AST) -> bool:
    """Whether it calls one of torch's makers and leaves the device to the default; `**words` may name one."""
    if not isinstance(node, ast.Call) or tree.dotted(node.func) not in MAKERS:
        return False
    return not any(word.arg in ("device", None) for word in node.keywords)


def test_new_tensors_name_their_device():
    found = {}
    for module in tree.package().values():
        lines = [node.lineno for node in ast.walk(module.tree) if lacks_device(node)]
        if len(lines) > allowed.DEFAULT_DEVICE.get(module.where, 0):
            found[module.where] = lines
    assert not found, f"say device=: {found}"


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("torch.empty(3, dtype=d)", True),
        ("torch.empty(3, device=x.device)", False),
        ("torch.zeros(3, **words)", False),
        ("torch.zeros_like(x)", False),
    ],
)
def test_the_gate_sees(code, bad):
    assert lacks_device(ast.parse(code).body[0].value) is bad
