# SPDX-License-Identifier: Apache-2.0
"""The section compression_training: defaults by technique, and what an enabled one needs."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deepspeed.compression.config import get_compression_config

SHARED = {
    "weight_quantization": {
        "enabled": False,
        "quantizer_kernel": False,
        "schedule_offset": 0,
        "quantize_groups": 1,
        "quantize_verbose": False,
        "quantization_type": "symmetric",
        "quantize_weight_in_forward": False,
        "rounding": "nearest",
        "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.001},
    },
    "activation_quantization": {
        "enabled": False,
        "quantization_type": "symmetric",
        "range_calibration": "dynamic",
        "schedule_offset": 1000,
    },
    "row_pruning": {"enabled": False, "method": "l1", "schedule_offset": 1000},
    "head_pruning": {
        "enabled": False,
        "method": "topk",
        "schedule_offset": 1000,
        "num_heads": None,
    },
    "channel_pruning": {"enabled": False, "method": "l1", "schedule_offset": 1000},
}
REQUIRED = {
    "weight_quantization": {"start_bits": 8, "target_bits": 4},
    "activation_quantization": {"bits": 8},
    "sparse_pruning": {"dense_ratio": 0.5},
    "row_pruning": {"dense_ratio": 0.5},
    "head_pruning": {"dense_ratio": 0.5},
    "channel_pruning": {"dense_ratio": 0.5},
}


def parse(**techniques):
    return get_compression_config({"compression_training": techniques})


def enabled(technique, groups, **shared):
    heads = {"num_heads": 12} if technique == "head_pruning" else {}
    section = {"shared_parameters": {"enabled": True, **heads, **shared}}
    return {technique: {**section, "different_groups": groups} if groups is not None else section}


@pytest.mark.parametrize(
    "config", [{}, {"compression_training": {}}, {"compression_training": None}]
)
def test_without_the_section_every_technique_is_off(config):
    found = get_compression_config(config)
    assert set(found) == {*REQUIRED, "layer_reduction"}
    assert not any(found[name]["shared_parameters"]["enabled"] for name in REQUIRED)
    assert found["layer_reduction"]["enabled"] is False


@pytest.mark.parametrize("technique", SHARED)
def test_defaults_of_shared_parameters(technique):
    assert parse()[technique] == {"shared_parameters": SHARED[technique], "different_groups": {}}


@pytest.mark.parametrize("technique", REQUIRED)
def test_enabled_technique_needs_groups(technique):
    with pytest.raises(AssertionError, match=f"{technique}.*different_groups"):
        parse(**enabled(technique, None))
    assert parse(**enabled(technique, {}))[technique]["different_groups"] == {}


@pytest.mark.parametrize("technique", REQUIRED)
def test_groups_get_their_defaults(technique):
    found = parse(**enabled(technique, {"g": {"params": REQUIRED[technique]}}))[technique]
    group = found["different_groups"]["g"]
    assert group["modules"] == ["*"] and group["related_modules"] is None
    period = {"quantization_period": 1} if technique == "weight_quantization" else {}
    assert group["params"] == {**period, **REQUIRED[technique]}


@pytest.mark.parametrize(
    ("technique", "missing"), [(name, key) for name, keys in REQUIRED.items() for key in keys]
)
def test_group_without_a_required_setting_is_refused_by_name(technique, missing):
    params = {key: value for key, value in REQUIRED[technique].items() if key != missing}
    with pytest.raises(
        AssertionError, match=rf"{technique}\.different_groups\.g\.params.*{missing}"
    ):
        parse(**enabled(technique, {"g": {"params": params}}))


def test_snip_momentum_needs_no_groups():
    found = parse(**enabled("sparse_pruning", None, method="snip_momentum", dense_ratio=0.2))
    shared = found["sparse_pruning"]["shared_parameters"]
    assert (shared["block_pattern"], shared["schedule_offset_stride"]) == ("4x1", 1)
    assert (shared["dense_ratio"], shared["excluded_modules"]) == (0.2, [])


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5])
def test_dense_ratio_lies_between_zero_and_one(ratio):
    with pytest.raises(ValidationError, match="dense_ratio"):
        parse(**enabled("sparse_pruning", None, method="snip_momentum", dense_ratio=ratio))


def test_head_pruning_needs_the_number_of_heads():
    section = enabled("head_pruning", {"g": {"params": {"dense_ratio": 0.5}}}, num_heads=None)
    with pytest.raises(AssertionError, match="num_heads"):
        parse(**section)


def test_layer_reduction_keeps_its_settings():
    found = parse(
        layer_reduction={"enabled": True, "keep_number_layer": 4, "teacher_layer": [1, 3]}
    )
    assert found["layer_reduction"]["keep_number_layer"] == 4
    assert found["layer_reduction"]["teacher_layer"] == [1, 3]
