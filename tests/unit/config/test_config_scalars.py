# SPDX-License-Identifier: Apache-2.0
"""Top-level keys: defaults, accepted values, and what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

DEFAULTS = {
    "managed_gradient_accumulation": True,
    "steps_per_print": None,
    "dump_state": False,
    "disable_allgather": False,
    "communication_data_type": None,
    "seq_parallel_communication_data_type": torch.float32,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "sparse_gradients_enabled": False,
    "gradient_clipping": 1.0,
    "graph_harvesting": False,
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dataloader_drop_last": False,
    "log_level": None,
    "use_data_before_expert_parallel_": False,
    "zero_enabled": False,
    "zero_optimization_stage": 0,
    "mics_shard_size": -1,
    "mics_hierarchial_params_gather": False,
    "amp_enabled": False,
    "amp_params": False,
    "torch_autocast_enabled": False,
    "torch_autocast_dtype": None,
    "torch_autocast_lower_precision_safe_modules": [
        "torch.nn.modules.linear.Linear",
        *(f"torch.nn.modules.conv.Conv{n}d" for n in (1, 2, 3)),
    ],
    "optimizer_name": None,
    "optimizer_params": None,
    "optimizer_legacy_fusion": False,
    "scheduler_name": None,
    "scheduler_params": None,
    "eigenvalue_enabled": False,
    "eigenvalue_verbose": False,
    "eigenvalue_max_iter": 100,
    "eigenvalue_tol": 1e-2,
    "eigenvalue_stability": 1e-6,
    "eigenvalue_gas_boundary_resolution": 1,
    "eigenvalue_layer_name": "bert.encoder.layer",
    "eigenvalue_layer_num": 0,
    "sparse_attention": None,
    "pld_enabled": False,
    "pld_params": False,
    "curriculum_enabled_legacy": False,
    "curriculum_params_legacy": False,
    "data_efficiency_enabled": False,
    "checkpoint_tag_validation_enabled": True,
    "checkpoint_tag_validation_fail": False,
    "load_universal_checkpoint": False,
    "use_node_local_storage": False,
    "grad_accum_dtype": None,
    "param_dtype": None,
    "buffer_dtype": None,
    "checkpoint_parallel_write_pipeline": False,
    "weight_quantization_config": None,
    "elasticity_enabled": False,
    "elastic_model_parallel_size": 1,
    "num_gpus_per_node": 1,
    "world_size": 1,
    "global_rank": 0,
}


@pytest.mark.parametrize("attribute", DEFAULTS)
def test_default_of_each_attribute(attribute):
    config = DeepSpeedConfig({"train_batch_size": 1})
    assert getattr(config, attribute) == DEFAULTS[attribute]


@pytest.mark.parametrize(
    "attribute",
    [
        "zero_config",
        "float16_config",
        "bfloat16_config",
        "compression_config",
        "flops_profiler_config",
        "autotuning_config",
        "hybrid_engine",
        "pipeline",
        "data_efficiency_config",
        "aio_config",
        "nebula_config",
        "datastates_config",
        "checkpoint_config",
        "compile_config",
        "timers_config",
        "tensor_parallel_config",
        "expert_parallel_config",
        "monitor_config",
        "comms_config",
        "activation_checkpointing_config",
    ],
)
def test_every_section_is_there_without_being_given(attribute):
    assert getattr(DeepSpeedConfig({"train_batch_size": 1}), attribute) is not None


@pytest.mark.parametrize(
    ("key", "attribute", "value", "expected"),
    [
        ("steps_per_print", "steps_per_print", 10, 10),
        ("steps_per_print", "steps_per_print", float("inf"), float("inf")),
        ("steps_per_print", "steps_per_print", None, None),
        ("communication_data_type", "communication_data_type", "BF16", torch.bfloat16),
        ("communication_data_type", "communication_data_type", "fp16", torch.float16),
        ("communication_data_type", "communication_data_type", "fp32", torch.float32),
        ("gradient_allreduce_op", "gradient_allreduce_op", "SUM", "sum"),
        ("gradient_clipping", "gradient_clipping", 0, 0.0),
        ("gradient_clipping", "gradient_clipping", None, 1.0),
        ("gradient_predivide_factor", "gradient_predivide_factor", 2, 2.0),
        ("sparse_gradients", "sparse_gradients_enabled", True, True),
        ("use_data_before_expert_parallelism", "use_data_before_expert_parallel_", True, True),
        ("log_level", "log_level", "info", "info"),
    ],
)
def test_values_that_are_taken(key, attribute, value, expected):
    found = getattr(DeepSpeedConfig({"train_batch_size": 1, key: value}), attribute)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("communication_data_type", "int8"),
        ("communication_data_type", 16),
        ("seq_parallel_communication_data_type", "x"),
        ("gradient_allreduce_op", "max"),
        ("gradient_clipping", "high"),
        ("steps_per_print", "often"),
        ("wall_clock_breakdown", "perhaps"),
        ("prescale_gradients", [True]),
        ("vocabulary_size", 2.5),
        ("sequence_parallel_size", "two"),
    ],
)
def test_values_that_are_refused_name_the_key(key, value):
    with pytest.raises(ValueError, match=key):
        DeepSpeedConfig({"train_batch_size": 1, key: value})


def test_flops_profiler_turns_the_wall_clock_on():
    config = {"train_batch_size": 1, "flops_profiler": {"enabled": True}}
    assert DeepSpeedConfig(config).wall_clock_breakdown is True


def test_vocabulary_that_is_no_multiple_of_eight_is_warned_of(logged):
    DeepSpeedConfig({"train_batch_size": 1, "vocabulary_size": 16})
    assert logged == []
    DeepSpeedConfig({"train_batch_size": 1, "vocabulary_size": 17})
    assert len(logged) == 1 and "17" in logged[0]


@pytest.mark.parametrize("written", ["Adam", "ADAM", "adam"])
def test_our_optimizers_are_found_in_any_case(written):
    config = DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": written}})
    assert config.optimizer_name == "adam" and config.optimizer_params is None


def test_torch_optimizers_keep_their_case_and_params_are_passed_on():
    params = {"lr": 0.1, "momentum": 0.9}
    given = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": params}}
    config = DeepSpeedConfig(given)
    assert config.optimizer_name == "SGD" and config.optimizer_params == params


def test_max_grad_norm_in_the_optimizer_points_to_gradient_clipping(logged):
    params = {"max_grad_norm": 1.0}
    DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "Adam", "params": params}})
    assert len(logged) == 1 and "gradient_clipping" in logged[0]


def test_scheduler_name_keeps_its_case():
    section = {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}
    config = DeepSpeedConfig({"train_batch_size": 1, "scheduler": section})
    assert config.scheduler_name == "WarmupLR"
    assert config.scheduler_params == {"warmup_num_steps": 0}


@pytest.mark.parametrize(
    "more",
    [
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 2, "zenflow": {}}},
        {"compile": {"deepcompile": True}},
    ],
)
def test_sum_of_gradients_is_refused_where_it_cannot_be(more):
    config = {"train_batch_size": 1, "gradient_allreduce_op": "sum", **more}
    with pytest.raises(ValueError, match="gradient_allreduce_op") as caught:
        DeepSpeedConfig(config)
    assert isinstance(caught.value, DeepSpeedConfigError)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_sum_of_gradients_is_accepted_elsewhere(stage):
    config = {
        "train_batch_size": 1,
        "gradient_allreduce_op": "sum",
        "zero_optimization": {"stage": stage},
    }
    assert DeepSpeedConfig(config).gradient_allreduce_op == "sum"


def test_errors_of_top_level_values_speak_of_the_config():
    with pytest.raises(ValidationError) as caught:
        DeepSpeedConfig({"train_batch_size": 1, "gradient_clipping": "high"})
    assert caught.value.title == "DeepSpeedConfig"


def test_print_logs_attributes_and_the_given_json(logged):
    import logging

    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        DeepSpeedConfig({"train_batch_size": 2000}).print("Some name")
    finally:
        logger.setLevel(before)
    assert logged[0] == "Some name:"
    assert "  train_batch_size ............. 2000" in logged
    assert logged[-1].endswith('json = {\n    "train_batch_size": 2.000000e+03\n}')
    assert not [text for text in logged if "_param_dict" in text]
