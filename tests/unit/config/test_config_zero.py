# SPDX-License-Identifier: Apache-2.0
"""The section zero_optimization: every default, alias and deprecation, and how wrong keys are answered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
    OffloadDeviceEnum,
    OffloadStateTypeEnum,
)

DEFAULTS = {
    "stage": 0,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "use_multi_rank_bucket_allreduce": True,
    "allgather_partitions": True,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": False,
    "load_from_fp32_weights": True,
    "elastic_checkpoint": False,
    "offload_param": None,
    "offload_optimizer": None,
    "zenflow": None,
    "sub_group_size": 1_000_000_000,
    "prefetch_bucket_size": 50_000_000,
    "param_persistence_threshold": 100_000,
    "model_persistence_threshold": sys.maxsize,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
    "gather_16bit_weights_on_model_save": False,
    "module_granularity_threshold": 0,
    "use_all_reduce_for_fetch_params": False,
    "allgather_sequential": False,
    "ignore_unused_parameters": True,
    "legacy_stage1": False,
    "round_robin_gradients": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zeropp_loco_param": None,
    "mics_shard_size": -1,
    "mics_hierarchical_params_gather": False,
    "memory_efficient_linear": True,
    "pipeline_loading_checkpoint": False,
    "override_module_apply": True,
    "log_trace_cache_warnings": False,
    "enable_sanity_checks": False,
    "save_muon_momentum_buffer_in_memory": False,
}
ALIASES = {
    "prefetch_bucket_size": 7,
    "param_persistence_threshold": 7,
    "model_persistence_threshold": 7,
    "max_live_parameters": 7,
    "max_reuse_distance": 7,
    "gather_16bit_weights_on_model_save": True,
    "module_granularity_threshold": 7,
    "use_all_reduce_for_fetch_params": True,
    "allgather_sequential": True,
}


def zero(**keys):
    return DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": keys}).zero_config


@pytest.mark.parametrize("key", DEFAULTS)
def test_default_of_each_key(key):
    assert getattr(zero(), key) == DEFAULTS[key]


@pytest.mark.parametrize("key", [k for k in DEFAULTS if k not in ("stage", "offload_param")])
def test_auto_means_the_default_of_each_key(key):
    assert getattr(zero(**{key: "auto"}), key) == DEFAULTS[key]


def test_strict_construction_keeps_auto_and_so_refuses_it():
    with pytest.raises(ValidationError, match="reduce_bucket_size"):
        DeepSpeedZeroConfig(strict=True, reduce_bucket_size="auto")


@pytest.mark.parametrize("key", ALIASES)
@pytest.mark.parametrize("prefix", ["", "stage3_"])
def test_both_spellings_of_each_stage_3_key_are_taken(key, prefix):
    assert getattr(zero(**{prefix + key: ALIASES[key]}), key) == ALIASES[key]


@pytest.mark.parametrize(("value", "stage"), [(True, 1), (False, 0)])
def test_bool_form_chooses_stage_one_or_none_with_a_warning(logged, value, stage):
    config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": value})
    assert config.zero_optimization_stage == stage and config.zero_enabled is bool(stage)
    assert len(logged) == 1 and "deprecated" in logged[0]


def test_allgather_size_belongs_to_the_bool_form_alone():
    config = {"train_batch_size": 1, "allgather_size": 1000}
    old = DeepSpeedConfig({**config, "zero_optimization": True}).zero_config
    new = DeepSpeedConfig({**config, "zero_optimization": {"stage": 1}}).zero_config
    assert (old.allgather_bucket_size, new.allgather_bucket_size) == (1000, 500_000_000)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "2", 2.0])
def test_stages_that_exist(stage):
    config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": stage}})
    assert config.zero_optimization_stage == int(stage) and type(config.zero_config.stage) is int
    assert config.zero_config.stage == ZeroStageEnum(int(stage))


@pytest.mark.parametrize("stage", [4, -1, 1.5, "two", [1]])
def test_stages_that_do_not_exist(stage):
    with pytest.raises(ValidationError, match="stage"):
        zero(stage=stage)


@pytest.mark.parametrize(
    ("stage", "given", "expected"),
    [(0, None, False), (1, None, False), (2, None, False), (3, None, True)]
    + [(stage, given, given) for stage in range(4) for given in (True, False)],
)
def test_overlap_comm_is_on_by_default_at_stage_3_alone(stage, given, expected):
    assert zero(stage=stage, overlap_comm=given).overlap_comm is expected


@pytest.mark.parametrize(("value", "expected"), [(5e8, 500_000_000), (1e4, 10_000), (200, 200)])
def test_integral_floats_are_whole_numbers(value, expected):
    found = zero(stage3_param_persistence_threshold=value).param_persistence_threshold
    assert found == expected and isinstance(found, int)


def test_the_fraction_that_older_trainers_write_for_the_prefetch_bucket_is_dropped():
    found = zero(stage=3, stage3_prefetch_bucket_size=0.9 * 64 * 64).prefetch_bucket_size
    assert found == 3686 and isinstance(found, int)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reduce_bucket_size", 230.4),
        ("reduce_bucket_size", -1),
        ("sub_group_size", "many"),
        ("contiguous_gradients", "perhaps"),
        ("zero_hpz_partition_size", -1),
        ("overlap_comm", 3),
        ("offload_param", "cpu"),
        ("offload_optimizer", {"device": "gpu"}),
        ("offload_optimizer", {"ratio": 1.5}),
        ("offload_param", {"buffer_count": -1}),
        ("zenflow", {"topk_ratio": 2}),
        ("zenflow", {"select_strategy": "often"}),
        ("zenflow", {"update_interval": "often"}),
        ("leaf_module", {"classes": 5}),
    ],
)
def test_wrong_values_are_refused_by_name(key, value):
    with pytest.raises(ValidationError, match=key):
        zero(stage=2, **{key: value})


@pytest.mark.parametrize(
    ("section", "wrong", "right"),
    [
        ({"stagee": 2}, "stagee", "stage"),
        ({"reduce_bucketsize": 2}, "reduce_bucketsize", "reduce_bucket_size"),
        ({"stage3_max_live_params": 2}, "stage3_max_live_params", "stage3_max_live_parameters"),
        ({"overlap_com": True}, "overlap_com", "overlap_comm"),
        ({"offload_optimiser": {"device": "cpu"}}, "offload_optimiser", "offload_optimizer"),
        ({"offload_optimizer": {"devic": "cpu"}}, "devic", "device"),
        ({"offload_param": {"pin_memmory": True}}, "pin_memmory", "pin_memory"),
    ],
)
def test_misspelt_key_names_the_nearest_right_one(section, wrong, right):
    with pytest.raises(ValidationError) as caught:
        zero(**section)
    text = str(caught.value)
    assert f"unknown key '{wrong}', did you mean '{right}'?" in text
    assert "Extra inputs are not permitted" in text
    assert caught.value.errors()[0]["loc"][-1] == wrong
    assert caught.value.errors()[0]["type"] == "extra_forbidden"


def test_key_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ValidationError, match="unknown key 'xyzzy', no such key"):
        zero(xyzzy=1)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ValidationError) as caught:
        zero(stagee=1, reduce_bucket_size=-1, offload_param={"devic": "cpu"})
    assert {error["loc"][-1] for error in caught.value.errors()} == {
        "stagee",
        "reduce_bucket_size",
        "devic",
    }


def test_unknown_key_with_braces_is_shown_as_it_is():
    with pytest.raises(ValidationError, match=r"'\{stage\}'"):
        zero(**{"{stage}": 1})


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ("cpu_offload", "offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("cpu_offload_param", "offload_param", DeepSpeedZeroOffloadParamConfig),
    ],
)
def test_old_offload_switches_become_sections(logged, old, new, section):
    on = zero(stage=3, **{old: True})
    assert getattr(on, new) == section(device="cpu")
    assert not hasattr(on, old)
    assert logged == [f"Config parameter {old} is deprecated use {new} instead"]
    assert getattr(zero(stage=3, **{old: False}), new) is None


def test_old_spelling_of_gathering_on_save_sets_the_new_one(logged):
    config = zero(stage=3, stage3_gather_fp16_weights_on_model_save=True)
    assert config.gather_16bit_weights_on_model_save is True
    assert len(logged) == 1


def test_old_pin_memory_switch_is_ignored_with_a_warning(logged):
    config = zero(stage=2, cpu_offload_use_pin_memory=True)
    assert config.offload_optimizer is None and config.offload_param is None
    assert len(logged) == 1 and "cpu_offload_use_pin_memory is deprecated" in logged[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_old_and_new_spelling_together_are_an_assertion_error(stage):
    with pytest.raises(AssertionError, match="Cannot provide deprecated parameter.*together"):
        zero(stage=stage, cpu_offload=True, offload_optimizer={"device": "cpu"})


def test_nothing_deprecated_nothing_logged(logged):
    zero(stage=2, offload_optimizer={"device": "cpu"}, stage3_max_live_parameters=1)
    assert logged == []


def test_defaults_of_the_offload_sections():
    assert zero(offload_param={}).offload_param.model_dump() == {
        "device": "none",
        "nvme_path": None,
        "buffer_count": 5,
        "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000,
        "pin_memory": True,
    }
    assert zero(offload_optimizer={}).offload_optimizer.model_dump() == {
        "device": "none",
        "nvme_path": None,
        "buffer_count": 4,
        "pin_memory": True,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
        "ratio": 1.0,
        "super_offload": False,
        "cpuadam_cores_perc": 0.8,
    }


@pytest.mark.parametrize(
    ("read", "write", "pipeline"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_pipeline_is_reading_or_writing(read, write, pipeline):
    section = DeepSpeedZeroOffloadOptimizerConfig(pipeline_read=read, pipeline_write=write)
    assert section.pipeline is pipeline


def test_nvme_path_may_be_null_or_a_path():
    assert zero(offload_param={"device": "nvme", "nvme_path": None}).offload_param.nvme_path is None
    given = zero(offload_param={"device": "nvme", "nvme_path": "swap"}).offload_param.nvme_path
    assert given == Path("swap")


def test_devices_compare_with_words_and_with_the_enum():
    device = zero(stage=2, offload_optimizer={"device": "cpu"}).offload_optimizer.device
    assert device == "cpu" and device == OffloadDeviceEnum.cpu


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_partial_offload_is_taken_wherever_states_are_sharded(stage):
    config = zero(stage=stage, offload_optimizer={"device": "cpu", "ratio": 0.3})
    assert config.offload_optimizer.ratio == 0.3


def test_partial_offload_without_zero_is_an_assertion_inside_the_section():
    with pytest.raises(ValidationError, match="ratio") as caught:
        zero(stage=0, offload_optimizer={"device": "cpu", "ratio": 0.3})
    assert caught.value.errors()[0]["type"] == "assertion_error"


def test_leaf_modules_have_defaults_that_given_classes_replace():
    default = zero().leaf_module
    assert len(default.classes) == 3 and all(name.endswith("MoeBlock") for name in default.classes)
    assert (default.names, default.name_suffixes) == ([], [])
    assert zero(leaf_module={"classes": ["A", "B", "A"]}).leaf_module.classes == ["A", "B"]
    assert zero(leaf_module={"names": "a.b"}).leaf_module.names == ["a.b"]
    assert zero(leaf_module={"names": "a.b"}).leaf_module.classes == default.classes


def test_two_configs_do_not_share_lists():
    zero().leaf_module.classes.append("mine")
    assert "mine" not in zero().leaf_module.classes


def test_zenflow_auto_values_stay_the_word():
    config = zero(stage=2, zenflow={"select_interval": "auto", "update_interval": 4})
    assert config.zenflow.select_interval == "auto" and config.zenflow.update_interval == 4
    assert config.zenflow.topk_ratio == 0.1 and config.zenflow.auto_ratio == 0.99


def test_elastic_checkpoint_at_stage_3_is_warned_of(logged):
    zero(stage=2, elastic_checkpoint=True)
    assert logged == []
    zero(stage=3, elastic_checkpoint=True)
    assert len(logged) == 1 and "elastic_checkpoint" in logged[0]


def test_assignment_is_validated():
    config = zero(stage=2)
    config.reduce_bucket_size = 1e6
    assert config.reduce_bucket_size == 1_000_000
    with pytest.raises(ValidationError):
        config.reduce_bucket_size = "big"


def test_kinds_of_state_that_can_be_moved():
    assert {kind.value for kind in OffloadStateTypeEnum} == {
        "optim_states",
        "hp_params",
        "lp_params",
        "lp_grads",
        "contiguous_grad_buffer",
    }
