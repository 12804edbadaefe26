# SPDX-License-Identifier: Apache-2.0
"""New tensors name their device: a script may set another default, and native code reads the CPU's addresses."""

from __future__ import annotations

import ast

from tests.structure import tree

MAKERS = frozenset(
    [
        "empty",
        "zeros",
        "ones",
        "full",
        "tensor",
        "arange",
        "rand",
        "randn",
        "randint",
        "eye",
        "normal",
    ]
)
# modules that a script constructs follow its default device, as those of torch do
FOLLOWS_DEFAULT = {
    "deepspeed/compression/layer_parts.py": 1,
    "deepspeed/linear/quantization.py": 1,
    "deepspeed/module_inject/policy.py": 2,
    "deepspeed/ops/transformer/transformer.py": 1,
    "deepspeed/profiling/flops_profiler/profiler.py": 1,
}


def without_device(module):
    """Lines of calls of torch's makers that leave the device to the default."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{m}" for m in MAKERS}:
            words = {word.arg for word in node.keywords}
            if "device" not in words and None not in words:
                yield node.lineno


def test_new_tensors_name_their_device():
    found = {}
    for module in tree.package().values():
        lines = list(without_device(module))
        if len(lines) > FOLLOWS_DEFAULT.get(module.where, 0):
            found[module.where] = lines
    assert not found
