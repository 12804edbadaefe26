# SPDX-License-Identifier: Apache-2.0
"""Weights of Megatron as whole numbers: the numbers times their scales, and where the scales are."""

from __future__ import annotations

import pytest
import torch

from deepspeed.runtime.weight_quantizer import WeightQuantization

SHAPES = {
    "attention.dense": (4, 4),
    "mlp.dense_4h_to_h": (4, 16),
    "mlp.dense_h_to_4h": (16, 4),
    "attention.query_key_value": (12, 4),
}


def test_a_state_dict_has_whole_numbers_and_scales_of_its_layers():
    torch.manual_seed(0)
    sd = {
        f"layers.{layer}.{name}.weight": torch.randn(shape)
        for layer in range(2)
        for name, shape in SHAPES.items()
    }
    sd["layers.0.norm.weight"] = torch.ones(4)
    found, scales = WeightQuantization().sd_quantize_megatron(sd, 8, 2)
    assert scales.shape == (2, 4, 4) and found["layers.0.norm.weight"].dtype == torch.float32
    order = (
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    for layer in range(2):
        for place, name in enumerate(order):
            key = f"layers.{layer}.{name}.weight"
            groups = 4 if "mlp" in name else 2  # twice as many for MLPs
            assert found[key].dtype == torch.int8
            assert (scales[layer, place, groups:] == 0).all()
            scale = scales[layer, place, :groups].view(-1, 1)
            back = (found[key].view(groups, -1) * scale).view(sd[key].shape)
            # half a level, and a whole one for the greatest value, which 127 stands for
            assert ((back - sd[key]).view(groups, -1).abs() <= 1.001 * scale).all()
            assert (back - sd[key]).abs().mean() < 0.5 * scale.max()


def test_parts_keep_their_order_and_ranks_get_their_groups():
    quantizer = WeightQuantization(mlp_extra_grouping=False)
    for name in SHAPES:
        quantizer.Quantize([torch.ones(4, 4), 2 * torch.ones(4, 4)], 8, 1, name)
    whole, (first, second) = quantizer.merge_scales(), quantizer.merge_scales_split(2)
    assert whole.shape == (1, 4, 2) and torch.equal(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(second, 2 * first, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="2 groups for 3 ranks"):
        quantizer.merge_scales_split(3)
    with pytest.raises(NotImplementedError, match="model_quantize"):
        quantizer.model_quantize(None, {}, 8, 1)
