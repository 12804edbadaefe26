# SPDX-License-Identifier: Apache-2.0
"""The configurations that programs in the field really pass: they parse, and say what they meant.

The dictionaries are those of DeepSpeed's own examples (CIFAR-10, BERT, supervised fine-tuning, ZeRO-Inference) and those
that transformers, accelerate, Lightning, TRL, Axolotl and OpenRLHF build.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_unbuilt import find_unresolved_auto, refuse_unbuilt

ROOT = Path(__file__).resolve().parents[2]


def cifar(dtype="fp16", stage=0):
    return {
        "train_batch_size": 16,
        "steps_per_print": 2000,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
        },
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {
            "enabled": dtype == "fp16",
            "fp16_master_weights_and_grads": False,
            "loss_scale": 0,
            "loss_scale_window": 500,
            "hysteresis": 2,
            "min_loss_scale": 1,
            "initial_scale_power": 15,
        },
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": stage,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 50000000,
            "reduce_bucket_size": 50000000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "cpu_offload": False,
        },
    }


def bert(dtype="bf16"):
    return {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
        dtype: {"enabled": True},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    }


def sft(stage=2, device="cpu", spelling="bfloat16"):
    return {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "offload_param": {"device": device},
            "offload_optimizer": {"device": device},
            "stage3_param_persistence_threshold": 1e4,
            "stage3_max_live_parameters": 3e7,
            "stage3_prefetch_bucket_size": 3e7,
            "memory_efficient_linear": False,
        },
        spelling: {"enabled": True},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "hybrid_engine": {
            "enabled": False,
            "max_out_tokens": 512,
            "inference_tp_size": 1,
            "release_inference_cache": False,
            "pin_parameters": True,
            "tp_gather_partition_size": 8,
        },
        "tensorboard": {
            "enabled": False,
            "output_path": "step1_tensorboard/ds_tensorboard_logs/",
            "job_name": "step1_model_tensorboard",
        },
    }


def zero_inference(hidden=2048, **more):
    return {
        "fp16": {"enabled": True},
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * hidden * hidden,
            "stage3_param_persistence_threshold": hidden,
            "stage3_max_live_parameters": 2 * hidden * hidden,
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
        "steps_per_print": 2000,
        "train_batch_size": 8,
        "wall_clock_breakdown": False,
        **more,
    }


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cifar(dtype, stage):
    config = DeepSpeedConfig(cifar(dtype, stage))
    refuse_unbuilt(config)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (16, 1)
    assert config.optimizer_name == "adam" and config.optimizer_params["betas"] == [0.8, 0.999]
    assert config.scheduler_name == "WarmupLR"
    assert config.float16_config.enabled is (dtype == "fp16")
    assert config.bfloat16_config.enabled is (dtype == "bf16")
    assert config.float16_config.initial_scale_power == 15
    assert config.zero_config.stage == stage and config.zero_config.offload_optimizer is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_bert(dtype):
    config = DeepSpeedConfig(bert(dtype))
    refuse_unbuilt(config)
    assert config.train_batch_size == 8 and config.gradient_accumulation_steps == 1
    assert config.zero_config.offload_optimizer.device == "cpu"


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "none"])
def test_supervised_fine_tuning(device, spelling):
    config = DeepSpeedConfig(sft(2, device, spelling))
    refuse_unbuilt(config)  # offload_param at stage 2 asks for nothing
    assert config.bfloat16_config.enabled is True
    assert config.gradient_accumulation_steps == 8
    assert config.zero_config.param_persistence_threshold == 10_000
    assert config.zero_config.memory_efficient_linear is False


def test_zero_inference():
    config = DeepSpeedConfig(zero_inference())
    assert config.zero_config.prefetch_bucket_size == 2 * 2048 * 2048
    assert config.zero_config.offload_param.device == "cpu"
    assert config.optimizer_name is None and config.float16_config.enabled


def test_zero_inference_with_four_bits_and_a_disk():
    quant = {"num_bits": 4, "group_size": 64, "group_dim": 1, "symmetric": False}
    aio = {
        "block_size": 1048576 * 16,
        "queue_depth": 64,
        "thread_count": 8,
        "use_gds": False,
        "single_submit": False,
        "overlap_events": True,
    }
    given = zero_inference(weight_quantization={"quantized_initialization": quant}, aio=aio)
    given["zero_optimization"]["offload_param"] = {
        "device": "nvme",
        "pin_memory": True,
        "nvme_path": "swap",
        "buffer_count": 5,
        "buffer_size": 2 * 1024**3,
    }
    config = DeepSpeedConfig(given)
    assert config.weight_quantization_config.quantized_initialization == quant
    assert config.aio_config["queue_depth"] == 64 and "thread_count" not in config.aio_config
    assert config.zero_config.offload_param.buffer_size == 2 * 1024**3


# ---------------------------------------------------------------------- transformers, accelerate
def trainer(**zero):
    """What the Trainer's documentation offers, after the Trainer has filled it in."""
    return {
        "fp16": {
            "enabled": False,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": 0,
                "warmup_max_lr": 5e-5,
                "warmup_num_steps": 0,
                "total_num_steps": 100,
            },
        },
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
            **zero,
        },
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 2000,
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8,
        "wall_clock_breakdown": False,
    }


def test_trainer():
    config = DeepSpeedConfig(trainer())
    refuse_unbuilt(config)
    assert config.zero_config.allgather_bucket_size == 200_000_000
    assert config.scheduler_params["warmup_num_steps"] == 0


def test_trainer_at_stage_3_before_sizes_are_known():
    zero = {
        "stage": 3,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    config = DeepSpeedConfig(trainer(**zero))
    assert config.zero_config.reduce_bucket_size == 500_000_000
    assert config.zero_config.prefetch_bucket_size == 50_000_000
    assert config.zero_config.param_persistence_threshold == 100_000
    assert find_unresolved_auto(config._param_dict) == []


def test_accelerates_view_before_the_trainer_has_filled_it_in():
    """zero.Init parses it while the rest is still "auto"; only the batch sizes are settled by then."""
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "steps_per_print": float("inf"),
    }
    config = DeepSpeedConfig(given)
    assert config.train_batch_size == 1
    assert find_unresolved_auto(given) == [
        "gradient_clipping",
        "optimizer.params.lr",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_num_steps",
    ]


def test_accelerate():
    given = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "none", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "gradient_clipping": 1.0,
        "steps_per_print": float("inf"),
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "auto_cast": True},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "msamp": {"enabled": False, "opt_level": "O1"},
    }
    config = DeepSpeedConfig(given)
    refuse_unbuilt(config)
    assert config.steps_per_print == float("inf")
    assert config.zero_config.offload_param.nvme_path is None
    assert config.communication_data_type is torch.float32


# ---------------------------------------------------------------------- others
def test_openrlhf_leaves_auto_inside_zero():
    given = {
        "train_batch_size": 8,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "sub_group_size": "auto",
            "stage3_max_live_parameters": "auto",
            "stage3_max_reuse_distance": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto",
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        },
        "optimizer": {"type": "Muon", "params": {"lr": 1e-6, "muon_lr": 0.02, "adam_lr": 3e-4}},
        "data_types": {"grad_accum_dtype": None},
        "checkpoint": {"load_universal": False},
        "compile": {"deepcompile": False},
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
    }
    zero = DeepSpeedConfig(given).zero_config
    assert (zero.sub_group_size, zero.max_live_parameters, zero.max_reuse_distance) == (1e9,) * 3
    assert (zero.param_persistence_threshold, zero.prefetch_bucket_size) == (1e5, 5e7)
    assert DeepSpeedConfig(given).optimizer_name == "muon"


def test_lightning():
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
        },
        "aio": {
            "block_size": 1048576,
            "queue_depth": 8,
            "single_submit": False,
            "overlap_events": True,
            "thread_count": 1,
        },
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 200_000_000,
            "reduce_bucket_size": 200_000_000,
            "sub_group_size": 1_000_000_000_000,
            "offload_optimizer": {
                "device": "cpu",
                "nvme_path": "/local_nvme",
                "buffer_count": 4,
                "pin_memory": False,
            },
        },
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
    }
    config = DeepSpeedConfig(given)
    refuse_unbuilt(config)
    assert config.zero_config.sub_group_size == 1_000_000_000_000


def test_trl_writes_dotted_keys_that_are_ignored():
    config = DeepSpeedConfig(
        {
            "train_batch_size": 1,
            "zero_optimization": {"stage": 0},
            "zero_optimization.reduce_bucket_size": 1024,
            "zero_optimization.stage3_param_persistence_threshold": 10240,
            "zero_optimization.stage3_prefetch_bucket_size": 0,
        }
    )
    assert config.zero_config.reduce_bucket_size == 500_000_000


def test_axolotl_names_without_stage3_are_taken_and_foreign_compile_keys_are_not():
    zero = {
        "stage": 3,
        "max_live_parameters": 0,
        "max_reuse_distance": 0,
        "gather_16bit_weights_on_model_save": True,
    }
    config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": zero})
    assert config.zero_config.max_live_parameters == 0
    assert config.zero_config.gather_16bit_weights_on_model_save is True
    with pytest.raises(ValidationError, match="disable"):
        DeepSpeedConfig(
            {"train_batch_size": 1, "compile": {"disable": False, "backend": "inductor"}}
        )


def test_llama_factory():
    zero = {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    }
    config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": zero})
    refuse_unbuilt(config)
    assert config.zero_config.round_robin_gradients is True


# ---------------------------------------------------------------------- types and costs
@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({}, (AssertionError, DeepSpeedConfigError)),
        ({"train_batch_size": "auto"}, (TypeError, DeepSpeedConfigError)),
        (
            {"train_batch_size": 1, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
            (AssertionError, DeepSpeedConfigError),
        ),
        ({"train_batch_size": 1, "communication_data_type": "int8"}, (ValueError,)),
        ({"train_batch_size": 1, "gradient_allreduce_op": "max"}, (ValueError,)),
        ({"train_batch_size": 1, "torch_autocast": {"dtype": "x"}}, (ValueError,)),
        ({"train_batch_size": 1, "fp16": {"x": 1}}, (ValidationError, ValueError)),
        ({"train_batch_size": 1, "zero_optimization": {"stage": 4}}, (ValidationError,)),
        ({"train_batch_size": 1, "checkpoint": {"tag_validation": "x"}}, (DeepSpeedConfigError,)),
        ("missing.json", (ValueError, DeepSpeedConfigError)),
    ],
)
def test_kind_of_each_error(config, kinds):
    with pytest.raises(Exception) as caught:
        DeepSpeedConfig(config)
    assert all(isinstance(caught.value, kind) for kind in kinds)


def test_names_that_others_import():
    import deepspeed.runtime.config as config
    import deepspeed.runtime.constants as constants

    assert config.ADAM_OPTIMIZER == "adam" and config.LAMB_OPTIMIZER == "lamb"
    assert config.MUON_OPTIMIZER == "muon" and len(config.DEEPSPEED_OPTIMIZERS) == 12
    assert (constants.ROUTE_TRAIN, constants.ROUTE_EVAL) == ("train", "eval")
    from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT, default_pg_timeout

    assert TORCH_DISTRIBUTED_DEFAULT_PORT == 29500
    assert default_pg_timeout.total_seconds() == 600


def test_parsing_module_is_cheap_to_import_and_needs_no_hjson():
    """CPU seconds, not wall time, so that a busy machine does not decide; pydantic is counted."""
    probe = (
        "import json, sys, time, torch\n"
        "start = time.process_time()\n"
        "import deepspeed.runtime.config as c\n"
        "seconds = time.process_time() - start\n"
        "c.DeepSpeedConfig({'train_batch_size': 1})\n"
        "print(json.dumps([seconds, 'hjson' in sys.modules, torch.distributed.is_initialized()]))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, hjson, distributed = json.loads(out.stdout.splitlines()[-1])
    assert seconds < 0.5  # 0.2 s where this was written
    assert not hjson and not distributed
