# SPDX-License-Identifier: Apache-2.0
"""The remaining sections: defaults as documented, strictness, and values that are refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from deepspeed.monitor.config import get_monitor_config
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError


def parse(**sections):
    return DeepSpeedConfig({"train_batch_size": 1, **sections})


def as_dict(value):
    return value.model_dump() if hasattr(value, "model_dump") else value


DEFAULTS = {
    "activation_checkpointing_config": {
        "partition_activations": False,
        "contiguous_memory_optimization": False,
        "cpu_checkpointing": False,
        "number_checkpoints": None,
        "synchronize_checkpoint_boundary": False,
        "profile": False,
    },
    "flops_profiler_config": {
        "enabled": False,
        "recompute_fwd_factor": 0.0,
        "profile_step": 1,
        "module_depth": -1,
        "top_modules": 1,
        "detailed": True,
        "output_file": None,
    },
    "monitor_config": {
        "tensorboard": {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
        "csv_monitor": {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
        "wandb": {"enabled": False, "group": None, "team": None, "project": "deepspeed"},
        "comet": {
            "enabled": False,
            "samples_log_interval": 100,
            "project": None,
            "workspace": None,
            "api_key": None,
            "experiment_name": None,
            "experiment_key": None,
            "online": None,
            "mode": None,
        },
    },
    "timers_config": {"enabled": True, "synchronized": True},
    "aio_config": {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    },
    "checkpoint_config": {
        "tag_validation": "WARN",
        "checkpoint_serialization": True,
        "writer": None,
    },
    "nebula_config": {
        "enabled": False,
        "nebula_load_path": None,
        "enable_nebula_load": True,
        "persistent_storage_path": None,
        "persistent_time_interval": 100,
        "num_of_version_in_retention": 2,
    },
    "pipeline": {
        "stages": "auto",
        "partition": "best",
        "seed_layers": False,
        "activation_checkpoint_interval": 0,
        "pipe_partitioned": True,
        "grad_partitioned": True,
        "use_reentrant": True,
    },
    "hybrid_engine": {
        "enabled": False,
        "max_out_tokens": 512,
        "inference_tp_size": 1,
        "release_inference_cache": False,
        "pin_parameters": True,
        "tp_gather_partition_size": 8,
        "enable_cuda_graph": False,
    },
    "autotuning_config": {
        "enabled": False,
        "fast": True,
        "results_dir": "autotuning_results",
        "exps_dir": "autotuning_exps",
        "overwrite": True,
        "start_profile_step": 3,
        "end_profile_step": 5,
        "start_step": None,
        "end_step": None,
        "metric": "throughput",
        "metric_path": None,
        "tuner_type": "gridsearch",
        "tuner_early_stopping": 5,
        "tuner_num_trials": 50,
        "arg_mappings": None,
        "model_info": None,
        "model_info_path": None,
        "mp_size": 1,
        "max_train_batch_size": None,
        "min_train_batch_size": 1,
        "max_train_micro_batch_size_per_gpu": 1024,
        "min_train_micro_batch_size_per_gpu": 1,
        "num_tuning_micro_batch_sizes": 3,
    },
    "data_efficiency_config": {
        "enabled": False,
        "seed": 1234,
        "data_sampling": {
            "enabled": False,
            "num_epochs": 1000,
            "num_workers": 0,
            "pin_memory": False,
            "curriculum_learning": {"enabled": False},
            "dynamic_batching": {
                "enabled": False,
                "lr_scaling_method": "linear",
                "min_batch_size": 1,
                "max_batch_size": None,
                "sequence_picking_order": "dataloader",
                "verbose": False,
            },
        },
        "data_routing": {
            "enabled": False,
            "random_ltd": {"enabled": False, "layer_token_lr_schedule": {"enabled": False}},
        },
    },
}


@pytest.mark.parametrize("attribute", DEFAULTS)
def test_defaults_of_each_section(attribute):
    assert as_dict(getattr(parse(), attribute)) == DEFAULTS[attribute]


COMPILE_ON = {"double_buffer", "keep_int_input_tensors", "offload_activation_pin_memory"}


def test_defaults_of_compile():
    values = parse().compile_config.model_dump()
    assert values.pop("free_activation_threshold") == 10 * 1024 * 1024
    assert values.pop("passes") is None
    assert {key for key, value in values.items() if value} == COMPILE_ON


def test_defaults_of_comms_logger():
    logger = parse().comms_config.comms_logger
    values = {"enabled": False, "verbose": False, "prof_all": True, "debug": False, "prof_ops": []}
    assert logger.model_dump() == values
    assert parse().comms_config.comms_logger_enabled is False
    assert parse(comms_logger={}).comms_config.comms_logger_enabled is True


SWITCHED = ["fp16", "bf16", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet"]
SWITCHED += ["hybrid_engine", "weight_quantization"]


@pytest.mark.parametrize("name", SWITCHED)
def test_misspelt_switch_of_a_strict_section_names_the_right_one(name):
    with pytest.raises(ValidationError, match="unknown key 'enabledd', did you mean 'enabled'"):
        parse(**{name: {"enabledd": True}})


@pytest.mark.parametrize("name", [*SWITCHED, "compile", "tensor_parallel"])
def test_unknown_keys_are_errors_in_strict_sections(name):
    with pytest.raises(ValidationError, match="xyzzy"):
        parse(**{name: {"xyzzy": 1}})


@pytest.mark.parametrize(
    "section", [{"timers": {"throughput": {"x": 1}}}, {"tensor_parallel": {"tp": {"x": 1}}}]
)
def test_nested_strict_sections(section):
    with pytest.raises(ValidationError, match="unknown key 'x'"):
        parse(**section)


LOOSE = ["activation_checkpointing", "flops_profiler", "aio", "checkpoint", "nebula", "autotuning"]
LOOSE += ["data_types", "torch_autocast", "timers", "optimizer", "pipeline", "data_efficiency"]
LOOSE += ["expert_parallel", "progressive_layer_drop", "quantize_training", "compression_training"]


@pytest.mark.parametrize("name", LOOSE)
def test_sections_in_which_unknown_keys_are_ignored(name):
    assert parse(**{name: {"xyzzy": 1}})


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"flops_profiler": {"profile_step": "third"}}, "profile_step"),
        ({"aio": {"block_size": "big"}}, "block_size"),
        ({"hybrid_engine": {"max_out_tokens": 0}}, "max_out_tokens"),
        ({"compile": {"passes": ["z2"]}}, "passes"),
        ({"comet": {"mode": "put"}}, "mode"),
        ({"activation_checkpointing": {"number_checkpoints": "all"}}, "number_checkpoints"),
        ({"tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 4}}}, "tp_size"),
        ({"tensor_parallel": {"preset_model": "unheard"}}, "preset_model"),
        ({"tensor_parallel": {"dtype": "fp12"}}, "dtype"),
        ({"expert_parallel": {"autoep_size": 0}}, "autoep_size"),
        ({"expert_parallel": {"load_balance_coeff": 0.1}}, "load_balance_coeff"),
        ({"expert_parallel": {"score_func": "relu"}}, "score_func"),
        ({"expert_parallel": {"score_apply": "mid"}}, "score_apply"),
        ({"expert_parallel": {"top_k": "some"}}, "top_k"),
    ],
)
def test_values_that_are_refused_name_the_key(section, name):
    with pytest.raises(ValueError, match=name):
        parse(**section)


@pytest.mark.parametrize(
    ("mode", "enabled", "fail"),
    [("Ignore", False, False), ("warn", True, False), ("FAIL", True, True)],
)
def test_tag_validation(mode, enabled, fail):
    config = parse(checkpoint={"tag_validation": mode})
    assert config.checkpoint_tag_validation_enabled is enabled
    assert config.checkpoint_tag_validation_fail is fail
    assert config.checkpoint_config["tag_validation"] == mode.upper()


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"tag_validation": "maybe"}, "tag_validation"),
        ({"tag_validation": 3}, "tag_validation"),
        ({"parallel_write": {"pipeline_stage": "yes"}}, "pipeline_stage"),
        ({"writer": {"type": "SLOW"}}, "writer.type"),
        ({"writer": {"data_parallel": "RACK"}}, "writer.data_parallel"),
    ],
)
def test_bad_checkpoint_values_are_config_errors(section, key):
    with pytest.raises(DeepSpeedConfigError, match=key):
        parse(checkpoint=section)


def test_checkpoint_values():
    section = {
        "load_universal": True,
        "use_node_local_storage": True,
        "parallel_write": {"pipeline_stage": True},
        "writer": {"type": "python", "data_parallel": "socket"},
    }
    config = parse(checkpoint=section)
    assert config.load_universal_checkpoint and config.use_node_local_storage
    assert config.checkpoint_parallel_write_pipeline
    assert config.checkpoint_config["writer"] == {
        "type": "PYTHON",
        "io_buffer_size": 64 * 1024 * 1024,
        "io_buffer_double": True,
        "show_statistics": False,
        "data_parallel": "SOCKET",
        "decoupled": False,
        "io_multiplier": 1,
    }


@pytest.mark.parametrize(
    ("value", "enabled"), [(False, False), (True, True), ({}, True), ({"a": 1}, True)]
)
def test_datastates_is_on_for_anything_but_false(value, enabled):
    config = parse(datastates_ckpt=value).datastates_config
    assert config.enabled is enabled and config.config == value


def test_pipeline_keeps_further_keys():
    config = parse(pipeline={"stages": 4, "custom": [1], "use_reentrant": False})
    assert config.pipeline["stages"] == 4 and config.pipeline["custom"] == [1]
    assert config.pipeline["use_reentrant"] is False


def test_tensor_parallel_words_and_aliases():
    config = parse(tensor_parallel={"dtype": "bf16", "tp": {"tp_size": 2}, "kernel_inject": True})
    tp = config.tensor_parallel_config
    assert tp.dtype is torch.bfloat16 and tp.tensor_parallel.tp_size == 2
    assert tp.replace_with_kernel_inject is True
    assert parse().tensor_parallel_config.autotp_size == 0


def test_expert_parallel_tells_null_from_absent():
    absent = parse().expert_parallel_config.expert_w3
    null = parse(expert_parallel={"expert_w3": None}).expert_parallel_config.expert_w3
    assert null is None and absent is not None


def test_weight_quantization_is_none_until_given():
    section = {"quantized_initialization": {"num_bits": 4, "group_size": 64}}
    found = parse(weight_quantization=section).weight_quantization_config
    assert (found.enabled, found.num_bits, found.q_type, found.q_groups) == (
        True,
        8,
        "symmetric",
        1,
    )
    assert found.quantized_initialization == {"num_bits": 4, "group_size": 64}
    assert found.post_init_quant == {}


@pytest.mark.parametrize("name", ["tensorboard", "csv_monitor", "wandb", "comet"])
def test_monitor_is_enabled_by_any_section(name):
    assert get_monitor_config({name: {"enabled": True}}).enabled is True
    assert get_monitor_config({name: {"enabled": False}}).enabled is False
    assert getattr(parse(**{name: {"enabled": True}}).monitor_config, name).enabled is True


def test_section_models_also_take_the_whole_configuration():
    whole = {"train_batch_size": 1, "flops_profiler": {"profile_step": 7}}
    assert DeepSpeedFlopsProfilerConfig(whole).profile_step == 7
    assert DeepSpeedFlopsProfilerConfig(profile_step=7).profile_step == 7
    assert DeepSpeedFlopsProfilerConfig({}).profile_step == 1


def test_progressive_layer_drop():
    config = parse(progressive_layer_drop={"enabled": True, "theta": 0.5})
    assert config.pld_enabled and config.pld_params == {"theta": 0.5, "gamma": 0.001}
    assert parse(progressive_layer_drop={"enabled": False}).pld_params is False


def test_legacy_curriculum_gives_up_its_switch():
    section = {"enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8}
    config = parse(curriculum_learning=section)
    assert config.curriculum_enabled_legacy is True
    assert config.curriculum_params_legacy == {"curriculum_type": "seqlen", "min_difficulty": 8}
    assert section["enabled"] is True
    with pytest.raises(KeyError, match="enabled"):
        parse(curriculum_learning={"curriculum_type": "seqlen"})


@pytest.mark.parametrize(
    ("part", "key"),
    [("curriculum_learning", "curriculum_metrics"), ("dynamic_batching", "max_tokens")],
)
def test_data_sampling_parts_need_their_settings_once_enabled(part, key):
    def section(**keys):
        return {
            "enabled": True,
            "data_sampling": {"enabled": True, part: {"enabled": True, **keys}},
        }

    with pytest.raises(AssertionError, match=key):
        parse(data_efficiency=section())
    kept = parse(data_efficiency=section(**{key: {"seqlen": 1}, "further": 2}))
    assert kept.data_efficiency_enabled is True
    assert kept.data_efficiency_config["data_sampling"][part][key] == {"seqlen": 1}
    assert kept.data_efficiency_config["data_sampling"][part]["further"] == 2


SPARSE_KEYS = {
    "dense": {"block"},
    "fixed": {
        "block",
        "different_layout_per_head",
        "num_local_blocks",
        "num_global_blocks",
        "attention",
        "horizontal_global_attention",
        "num_different_global_patterns",
    },
}


@pytest.mark.parametrize("mode", ["dense", "fixed", "variable", "bigbird", "bslongformer"])
def test_sparse_attention_returns_the_keys_of_its_mode(mode):
    found = parse(sparse_attention={"mode": mode, "block": 32, "unheard": 1}).sparse_attention
    assert found["mode"] == mode and found["block"] == 32 and "unheard" not in found
    if mode in SPARSE_KEYS:
        assert set(found) == {"mode", *SPARSE_KEYS[mode]}


def test_sparse_attention_default_and_unknown_mode():
    assert parse(sparse_attention={}).sparse_attention["mode"] == "fixed"
    with pytest.raises(NotImplementedError, match="checkered"):
        parse(sparse_attention={"mode": "checkered"})


def test_eigenvalue_is_read_from_quantize_training():
    config = parse(quantize_training={"eigenvalue": {"max_iter": 5, "layer_name": "h"}})
    assert (config.eigenvalue_max_iter, config.eigenvalue_layer_name) == (5, "h")


def test_every_attribute_can_be_shown():
    config = parse(amp={"enabled": False})
    assert all(isinstance(str(value), str) for value in vars(config).values())
