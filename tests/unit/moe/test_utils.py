# SPDX-License-Identifier: Apache-2.0
"""Expert params get param groups of their own."""

import pytest
import torch
from torch import nn

from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import (
    configure_moe_param_groups,
    has_moe_layers,
    is_moe_param,
    is_moe_param_group,
    split_params_grads_into_shared_and_expert_params,
    split_params_into_different_moe_groups_for_optimizer,
    split_params_into_shared_and_expert_params,
)


@pytest.fixture
def model():
    first = MoE(8, nn.Linear(8, 8), num_experts=4, use_residual=True)
    return nn.Sequential(first, MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2))


def sizes(group):
    return [param.numel() for param in group["params"]]


def test_moe_layers_are_found(model):
    assert has_moe_layers(nn.Sequential(nn.Linear(1, 1), model)) == (True, 4)
    assert has_moe_layers(nn.Linear(1, 1)) == (False, 0)


def test_expert_params_are_known_by_their_mark(model):
    assert is_moe_param(model[0].deepspeed_moe.experts.deepspeed_experts[0].weight)
    assert not is_moe_param(model[0].coefficient.weight)
    assert not is_moe_param(torch.zeros(1))


def test_one_group_becomes_one_more_for_each_expert_group(model):
    given = {"params": list(model.parameters()), "name": "all", "lr": 0.1}
    groups = split_params_into_different_moe_groups_for_optimizer(given)
    assert groups[0] is given
    assert [g["name"] for g in groups] == ["all", "ep_size_1", "ep_size_2"]
    assert [is_moe_param_group(g) for g in groups] == [False, True, True]
    assert [g["lr"] for g in groups] == [0.1] * 3
    assert sizes(groups[0]) == [32, 64, 8, 16, 2, 16]
    assert sizes(groups[1]) == [64, 8] * 4
    assert sizes(groups[2]) == [64, 8]
    torch.optim.SGD(groups, lr=0.1)


def test_groups_keep_their_order_and_settings(model):
    params = list(model.parameters())
    given = ({"params": params[:5], "name": "a"}, {"params": params[5:], "name": "b", "lr": 2.0})
    groups = split_params_into_different_moe_groups_for_optimizer(given)
    names = ["a", "b", "ep_size_1", "ep_size_1", "ep_size_2"]
    assert [g["name"] for g in groups] == names
    assert [g.get("lr") for g in groups] == [None, 2.0, None, 2.0, 2.0]
    assert sum(len(g["params"]) for g in groups) == len(params)


@pytest.mark.parametrize(
    ("limit", "parts"),
    [(150, [[64, 8, 64, 8], [64, 8, 64, 8]]), (72, [[64, 8]] * 4), (10, [[64], [8]] * 4)],
)
def test_large_groups_are_split(model, limit, parts):
    given = {"params": list(model[0].parameters()), "name": "all"}
    groups = split_params_into_different_moe_groups_for_optimizer(given, max_group_size=limit)
    assert [sizes(g) for g in groups[1:]] == parts


def test_iterators_of_params_are_not_lost(model):
    given = {"params": model.parameters(), "name": "all"}
    groups = split_params_into_different_moe_groups_for_optimizer(given)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_groups_without_experts_stay_as_they_are():
    given = {"params": list(nn.Linear(2, 2).parameters())}
    assert split_params_into_different_moe_groups_for_optimizer(given) == [given]


def test_a_group_with_experts_needs_a_name(model):
    with pytest.raises(KeyError, match="name"):
        split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters())})


def test_params_are_no_groups(model):
    with pytest.raises(TypeError, match="param groups are needed"):
        split_params_into_different_moe_groups_for_optimizer(list(model.parameters()))


def test_params_and_gradients_are_split(model):
    params = list(model.parameters())
    shared, expert = split_params_into_shared_and_expert_params(params)
    assert (len(shared), len(expert)) == (6, 10)
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad = None
    shared, expert = split_params_grads_into_shared_and_expert_params(params)
    assert (len(shared), len(expert)) == (5, 10)


def test_params_of_a_model_become_groups(model):
    groups = configure_moe_param_groups(list(model.parameters()))
    assert [g["name"] for g in groups] == ["dense-params", "ep_size_1", "ep_size_2"]
    nameless = configure_moe_param_groups([{"params": list(model.parameters())}])
    assert [g.get("moe", False) for g in nameless] == [False, True, True]


def test_groups_without_experts_are_returned_themselves():
    given = [{"params": list(nn.Linear(2, 2).parameters())}]
    assert configure_moe_param_groups(given) is given
    with pytest.raises(AssertionError, match="must be a list"):
        configure_moe_param_groups(iter(given))
