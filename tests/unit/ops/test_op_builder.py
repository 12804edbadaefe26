# SPDX-License-Identifier: Apache-2.0
"""The legacy builders: names, what they load, and what they say when they cannot."""

from __future__ import annotations

import pytest
import torch

import deepspeed.ops
from deepspeed.ops import op_builder
from deepspeed.ops.op_builder.all_ops import ALL_OPS, ROWS
from deepspeed.ops.rules import adagrad_step, adam_step, lion_step
from deepspeed.ops.transformer.inference.bias_add import nhwc_bias_add

OURS = ["cpu_adagrad", "cpu_adam", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion", "utils"]


def test_every_row_has_a_class_and_an_entry():
    for row in ROWS:
        builder = getattr(op_builder, f"{row.title}Builder")
        assert row.name == builder.NAME
        assert isinstance(ALL_OPS[row.name], builder)


def test_compatible_ops_are_those_that_load():
    table = deepspeed.ops.__compatible_ops__
    usable = {name for name, loads in table.items() if loads}
    assert usable == {row.name for row in ROWS if row.namespace is not None}
    assert usable >= set(OURS)
    for name, builder in ALL_OPS.items():
        if table[name]:
            assert builder.load() is builder.load()
        else:
            with pytest.raises(RuntimeError, match=name):
                builder.load()
            assert builder.error_log


def test_an_unknown_builder_is_an_attribute_error():
    with pytest.raises(AttributeError, match="FlyingCarBuilder"):
        _ = op_builder.FlyingCarBuilder


def tensors(count):
    return [torch.randn(40).abs_() for _ in range(count)]


def test_cpu_adam_functions():
    module = op_builder.CPUAdamBuilder().load()
    param, grad, m, v = tensors(4)
    expected = [t.clone() for t in (param, m, v)]
    adam_step(
        expected[0], *expected[1:], grad, None, 0.1, 0.9, 0.99, 1e-8, 0.1, 2, False, True, 1.0
    )
    start = param.clone()
    module.create_adam(5, 1e-3, 0.9, 0.99, 1e-8, 0.0, False, False)
    module.adam_update(5, 2, 0.1, 0.9, 0.99, 1e-8, 0.1, True, param, grad, m, v)
    assert all(torch.equal(a, b) for a, b in zip((param, m, v), expected, strict=True))
    module.adam_rollback(5, 2, 0.1, 0.9, 0.99, 1e-8, 0.1, True, param, grad, m, v)
    # the roundings of one fp32 step
    torch.testing.assert_close(param, start, rtol=0, atol=1e-6)
    module.destroy_adam(5)
    with pytest.raises(KeyError):
        module.adam_update(5, 2, 0.1, 0.9, 0.99, 1e-8, 0.1, True, param, grad, m, v)


def test_cpu_adagrad_and_lion_functions():
    param, grad, state = tensors(3)
    expected = [param.clone(), state.clone()]
    adagrad_step(*expected, grad, None, 0.1, 1e-8, 0.1, 1.0)
    module = op_builder.CPUAdagradBuilder().load()
    module.create_adagrad(0, 1e-2, 1e-8, 0.0, False)
    module.adagrad_update(0, 1, 0.1, 1e-8, 0.1, param, grad, state)
    module.destroy_adagrad(0)
    assert torch.equal(param, expected[0])
    lion_step(*expected, grad, None, 0.1, 0.9, 0.99, 0.1, 1.0)
    module = op_builder.CPULionBuilder().load()
    module.create_lion(0, 1e-3, 0.9, 0.99, 0.0, False)
    module.lion_update(0, 1, 0.1, 0.9, 0.99, 0.1, param, grad, state)
    module.destroy_lion(0)
    assert torch.equal(param, expected[0])


@pytest.mark.parametrize("mode", [0, 1])
def test_fused_adam_function(mode):
    lists = [tensors(2) for _ in range(4)]
    grads, params, first, second = lists
    expected = [t.clone() for t in (params[1], first[1], second[1])]
    adam_step(*expected, grads[1], None, 0.1, 0.9, 0.99, 1e-8, 0.1, 3, mode == 1, True, 1.0)
    module = op_builder.FusedAdamBuilder().load()
    flag = torch.zeros(1, dtype=torch.int)
    module.multi_tensor_adam(65536, flag, lists, 0.1, 0.9, 0.99, 1e-8, 3, mode, 1, 0.1)
    assert torch.equal(params[1], expected[0])
    module.multi_tensor_adam(65536, flag + 1, lists, 0.1, 0.9, 0.99, 1e-8, 3, mode, 1, 0.1)
    assert torch.equal(params[1], expected[0])


def test_bytes_of_tensors():
    cast = op_builder.UtilsBuilder().load().cast_to_byte_tensor
    assert cast(torch.tensor([1.0])).tolist() == [0, 0, 128, 63]
    assert [part.numel() for part in cast([torch.zeros(3), torch.zeros(2, dtype=torch.int16)])] == [
        12,
        4,
    ]


def test_a_user_builder_without_sources_says_so():
    class Mine(op_builder.OpBuilder):
        NAME = "mine"

    assert not Mine().is_compatible()
    with pytest.raises(RuntimeError, match="no sources"):
        Mine().load()


def test_the_version_module_has_the_legacy_tables():
    from deepspeed import git_version_info

    assert git_version_info.installed_ops["cpu_adam"] is True
    assert git_version_info.compatible_ops == deepspeed.ops.__compatible_ops__
    assert git_version_info.torch_info["version"] == ".".join(torch.__version__.split(".")[:2])
    assert git_version_info.accelerator_name in ("cpu", "cuda")


def test_the_bias_of_a_convolution_is_added_with_its_neighbours():
    shape, image = (2, 3, 4, 5), torch.channels_last
    x, other = (torch.randn(shape).to(memory_format=image) for _ in range(2))
    bias, more = torch.randn(3), torch.randn(3)
    column = (1, -1, 1, 1)
    assert torch.equal(nhwc_bias_add(x, bias), x + bias.view(column))
    assert torch.equal(nhwc_bias_add(x, bias, other=other), x + bias.view(column) + other)
    both = nhwc_bias_add(x, bias, other=other, other_bias=more)
    assert torch.equal(both, x + bias.view(column) + other + more.view(column))
