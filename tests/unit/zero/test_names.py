# SPDX-License-Identifier: Apache-2.0
"""What callers import by name: the linear function, the quantizer, the watched dict, the norms of groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepspeed.runtime import utils
from deepspeed.runtime.zero import linear
from deepspeed.runtime.zero.linear import (
    LinearFunctionForZeroStage3,
    LinearModuleForZeroStage3,
    zero3_linear_wrap,
)
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict, ensure_zero_ordered_dict
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer, MultipleAllGatherHandles


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_the_linear_function_has_the_right_gradients(shape):
    torch.manual_seed(0)
    of = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (5, 4), (5,))]
    assert torch.autograd.gradcheck(LinearFunctionForZeroStage3.apply, of)
    assert torch.autograd.gradcheck(lambda x, w: zero3_linear_wrap(x, w), of[:2])


def test_the_decorators_for_autocast_are_torchs():
    assert linear.noop_decorator is utils.noop_decorator
    for name in ("autocast_custom_fwd", "autocast_custom_bwd"):
        doubled = getattr(linear, name)(lambda ctx, x: 2 * x)
        assert doubled(SimpleNamespace(_fwd_used_autocast=False, _dtype=None), 3) == 6
    assert not hasattr(linear, "autocast_custom")


def test_the_linear_function_works_under_vmap():
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    got = torch.func.vmap(lambda row: LinearFunctionForZeroStage3.apply(row, weight, bias))(x)
    torch.testing.assert_close(got, x @ weight.t() + bias)


def test_autocast_during_the_backward_pass_changes_no_dtype():
    layer = LinearModuleForZeroStage3(4, 3)
    out = layer(torch.ones(2, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    assert torch.equal(layer.weight.grad, torch.full((3, 4), 2.0))


def test_the_quantizer_gives_back_what_it_took():
    values = torch.randn(200, 77)
    quantizer = CUDAQuantizer()
    codes, scale = quantizer.quantize(values)
    assert codes.dtype is torch.int8 and scale.numel() == 2
    back = quantizer.dequantize(codes, scale, values.dtype)
    # A step is max / 128; the largest code stands for 127 of them, and fp16 rounds by 2**-11.
    assert (back - values).abs().max() <= values.abs().max() * (1 / 128 + 2**-10)


@pytest.mark.parametrize(("numel", "groups"), [(8000, 1), (8001, 3), (2 * 8009, 8009), (1, 1)])
def test_values_are_cut_into_the_fewest_equal_groups(numel, groups):
    assert CUDAQuantizer().quantize(torch.ones(numel))[1].numel() == groups


def test_a_watched_dict_keeps_the_parameters():
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    ensure_zero_ordered_dict(module)
    watched = module._parameters
    ensure_zero_ordered_dict(module)
    assert isinstance(watched, ZeROOrderedDict) and module._parameters is watched
    assert module.weight is weight and list(watched) == ["weight", "bias"]


def test_several_handles_wait_as_one():
    class Waits:
        asked = None

        def wait(self, **kwargs):
            self.asked = kwargs

    handles = [Waits(), Waits()]
    MultipleAllGatherHandles(handles).wait(handle_dependency=False)
    assert [h.asked for h in handles] == [{"handle_dependency": False}] * 2
