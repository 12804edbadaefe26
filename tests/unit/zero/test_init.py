# SPDX-License-Identifier: Apache-2.0
"""`zero.Init` in one process: what its arguments change, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.mics import MiCS_Init

Override = partition_parameters.DeepSpeedTensorOverride


def test_a_job_of_several_needs_a_group_of_several(monkeypatch):
    deepspeed.init_distributed()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2"):
        deepspeed.zero.Init()


def test_a_group_of_one_that_the_caller_chose_is_meant(monkeypatch):
    deepspeed.init_distributed()
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = deepspeed.comm.new_group([0])
    with deepspeed.zero.Init(data_parallel_group=alone):
        assert torch.nn.Linear(2, 3).weight.ds_axis.size == 1


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (None, torch.bfloat16),
        ([Override.dtype, Override.device], torch.bfloat16),
        ([Override.device], torch.float32),
        ([], torch.float32),
    ],
)
def test_constructors_decide_what_they_are_told_to(overrides, dtype):
    with deepspeed.zero.Init(dtype=torch.bfloat16, tensor_overrides=overrides):
        made, whole = torch.zeros(2), torch.arange(3)
        layer = torch.nn.Linear(3, 2)
    assert made.dtype == dtype and whole.dtype == torch.int64
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.ds_shape == (2, 3)


def test_the_wrapper_is_looked_up_when_the_context_is_entered(monkeypatch):
    seen = []

    def wrapper(fn, target_fp_dtype, target_device):
        seen.append((fn is partition_parameters._orig_torch_arange, target_fp_dtype))
        return fn

    context = deepspeed.zero.Init(dtype=torch.float16)
    monkeypatch.setattr(partition_parameters, "zero_wrapper_for_fp_tensor_constructor", wrapper)
    with context:
        torch.zeros(1)
    assert (True, torch.float16) in seen


def test_a_disabled_context_does_nothing():
    with deepspeed.zero.Init(enabled=False), MiCS_Init(enabled=False):
        assert not hasattr(torch.nn.Linear(2, 2).weight, "ds_id")


@pytest.mark.parametrize("config", [None, {}, {"zero_optimization": {"stage": 3}}])
def test_mics_needs_the_size_of_its_groups(config):
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="mics_shard_size"):
        MiCS_Init(config_dict_or_path=config)


def test_groups_that_do_not_divide_the_ranks_are_refused():
    config = {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}
    with pytest.raises(deepspeed.utils.errors.DeepSpeedCommError, match="divisor of 1"):
        MiCS_Init(config_dict_or_path=config)


def test_frozen_matrices_may_be_codes_from_the_start():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = torch.nn.Parameter(torch.randn(8, 64), requires_grad=False)
            self.head = torch.nn.Parameter(torch.randn(8, 64))

    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(0)
    with deepspeed.zero.Init(dtype=torch.float32, zero_quantized_nontrainable_weights=True):
        net = Net()
    assert net.base.ds_tensor.dtype == torch.uint8 and net.head.ds_tensor.dtype == torch.float32
    with deepspeed.zero.GatheredParameters([net.base, net.head]):
        lost = (net.base - plain.base).abs().max()
        assert torch.equal(net.head, plain.head)
    assert 0 < lost <= plain.base.abs().max() / 127 / 2 * (1 + 2**-20)


def test_a_parameter_of_one_element_tells_its_value():
    with deepspeed.zero.Init(dtype=torch.float32):
        layer = torch.nn.Linear(1, 1)
    with deepspeed.zero.GatheredParameters(layer.weight, modifier_rank=0), torch.no_grad():
        layer.weight.fill_(2.5)
    assert layer.weight.item() == 2.5 and layer.weight.numel() == 0
    with pytest.raises(NotImplementedError, match=r"engine\.backward"):
        layer.weight.partition_gradients()


@pytest.mark.parametrize("kind", [torch.nn.Linear, torch.nn.LayerNorm])
def test_modules_made_without_memory_get_their_params_sharded(kind):
    with deepspeed.zero.Init(dtype=torch.float32):
        layer = torch.nn.utils.skip_init(kind, *((6, 4) if kind is torch.nn.Linear else (24,)))
    assert layer.weight.ds_tensor.numel() == 24 and layer.weight.numel() == 0
    with deepspeed.zero.GatheredParameters(layer.weight, modifier_rank=0), torch.no_grad():
        layer.weight.fill_(0.5)
    assert layer.weight.ds_tensor.eq(0.5).all()


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.other = torch.nn.Parameter(torch.empty(6, device="meta"))


def test_a_param_under_two_names_that_was_made_without_memory_stays_one():
    with deepspeed.zero.Init(dtype=torch.float32):
        net = Twice()
    assert net.one is net.other and net.other.ds_tensor.numel() == 6 and not net.other.is_meta


def test_sanity_checks_of_the_configuration_hold_before_there_is_an_engine():
    config = {"zero_optimization": {"stage": 3, "enable_sanity_checks": True}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = torch.nn.Linear(4, 4)
    with (
        pytest.raises(RuntimeError, match="in-place modification"),
        deepspeed.zero.GatheredParameters(net.weight),
        torch.no_grad(),
    ):
        net.weight.add_(0.0)  # even one that changes nothing


def test_sanity_checks_leave_parameters_alone_that_are_gathered_beside_and_not_checked():
    nets = []
    for checks in (True, False):
        config = {"zero_optimization": {"stage": 3, "enable_sanity_checks": checks}}
        with deepspeed.zero.Init(config_dict_or_path=config):
            nets.append(torch.nn.Linear(4, 4))
    weights = [net.weight for net in nets]
    with deepspeed.zero.GatheredParameters(weights), torch.no_grad():
        weights[1].add_(1.0)
    with (
        pytest.raises(RuntimeError, match="in-place modification"),
        deepspeed.zero.GatheredParameters(weights),
        torch.no_grad(),
    ):
        weights[0].add_(1.0)
