# SPDX-License-Identifier: Apache-2.0
"""The engine's public getters: one line each, sorted, the configuration's first, then those of its state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.format import expert_optim_file
from .clock import Counters
from .engine_checkpoint import make_executable
from .engine_dtypes import DtypeAccessors
from .lr_schedules import get_torch_optimizer
from .zero.state import param_shapes

# What the getters below return is the configuration's own field, so the name says it all: no docstrings.


class ConfigAccessors(DtypeAccessors, Counters):
    """Zero-argument methods that read the configuration, under the names that scripts call."""

    _config: Any
    basic_optimizer: Any
    optimizer: Any
    mesh: Any

    def aio_config(self) -> Any:
        return self._config.aio_config

    def amp_enabled(self) -> bool:
        return self._config.amp_enabled

    def amp_params(self) -> Any:
        return self._config.amp_params

    def autotp_size(self) -> int:
        return self._config.tensor_parallel_config.autotp_size

    def autotuning_enabled(self) -> bool:
        return bool(self._config.autotuning_config.enabled)

    def bf16_master_weights_and_gradients(self) -> bool:
        return self._config.bfloat16_config.bf16_master_weights_and_grads

    def bf16_optimizer_states(self) -> bool:
        return self._config.bfloat16_config.bf16_optimizer_states

    def bfloat16_enabled(self) -> bool:
        return self._config.bfloat16_config.enabled

    def checkpoint_serialization_enabled(self) -> bool:
        return self._config.checkpoint_config.get("checkpoint_serialization", True)

    def checkpoint_tag_validation_enabled(self) -> bool:
        return self._config.checkpoint_tag_validation_enabled

    def checkpoint_tag_validation_fail(self) -> bool:
        return self._config.checkpoint_tag_validation_fail

    def checkpoint_writer_enabled(self) -> bool:
        return bool(self._config.checkpoint_config.get("writer"))

    @property
    def communication_data_type(self) -> torch.dtype:
        return self._config.communication_data_type or self.get_data_types()[0]

    @communication_data_type.setter
    def communication_data_type(self, value: torch.dtype) -> None:
        self._config.communication_data_type = value

    def compile_autosp(self) -> bool:
        return "autosp" in (self._config.compile_config.passes or [])

    def compile_autotp(self) -> bool:
        return "autotp" in (self._config.compile_config.passes or [])

    def compile_zero_optimization_stage(self) -> bool:
        return bool({"z1", "z3"} & set(self._config.compile_config.passes or []))

    def cpuadam_cores_perc(self) -> float:
        return _of(self._config.zero_config.offload_optimizer, "cpuadam_cores_perc", 0.9)

    def curriculum_enabled_legacy(self) -> bool:
        return self._config.curriculum_enabled_legacy

    def curriculum_learning_config(self) -> Any:
        return self._config.data_efficiency_config["data_sampling"]["curriculum_learning"]

    def curriculum_learning_enabled(self) -> bool:
        return self.curriculum_learning_config()["enabled"]

    def curriculum_params_legacy(self) -> Any:
        return self._config.curriculum_params_legacy

    def data_efficiency_config(self) -> Any:
        return self._config.data_efficiency_config

    def data_efficiency_enabled(self) -> bool:
        return self._config.data_efficiency_enabled

    def data_sampling_config(self) -> Any:
        return self._config.data_efficiency_config["data_sampling"]

    def data_sampling_enabled(self) -> bool:
        return self.data_sampling_config()["enabled"]

    def dataloader_drop_last(self) -> bool:
        return self._config.dataloader_drop_last

    def dump_state(self) -> bool:
        return self._config.dump_state

    def dynamic_loss_scale(self) -> bool:
        return self._config.float16_config.loss_scale == 0

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        fp16 = self._config.float16_config
        return {
            "init_scale": 2.0**fp16.initial_scale_power,
            "scale_window": fp16.loss_scale_window,
            "delayed_shift": fp16.hysteresis,
            "consecutive_hysteresis": fp16.consecutive_hysteresis,
            "min_scale": fp16.min_loss_scale,
        }

    def eigenvalue_enabled(self) -> bool:
        return self._config.eigenvalue_enabled

    def elasticity_enabled(self) -> bool:
        return self._config.elasticity_enabled

    def flops_profiler_detailed(self) -> bool:
        return self._config.flops_profiler_config.detailed

    def flops_profiler_enabled(self) -> bool:
        return self._config.flops_profiler_config.enabled

    def flops_profiler_module_depth(self) -> int:
        return self._config.flops_profiler_config.module_depth

    def flops_profiler_output_file(self) -> Any:
        return self._config.flops_profiler_config.output_file

    def flops_profiler_profile_step(self) -> int:
        return self._config.flops_profiler_config.profile_step

    def flops_profiler_recompute_fwd_factor(self) -> float:
        return self._config.flops_profiler_config.recompute_fwd_factor

    def flops_profiler_top_modules(self) -> int:
        return self._config.flops_profiler_config.top_modules

    def fp16_auto_cast(self) -> bool:
        return self._config.float16_config.auto_cast

    def fp16_enabled(self) -> bool:
        return self._config.float16_config.enabled

    def fp16_master_weights_and_gradients(self) -> bool:
        return self._config.float16_config.fp16_master_weights_and_grads

    def gradient_accumulation_steps(self) -> int:
        return self._config.gradient_accumulation_steps

    def gradient_clipping(self) -> float:
        return self._config.gradient_clipping

    def gradient_predivide_factor(self) -> float:
        return self._config.gradient_predivide_factor

    def graph_harvesting(self) -> bool:
        return self._config.graph_harvesting

    def initial_dynamic_scale(self) -> float:
        return 2.0**self._config.float16_config.initial_scale_power

    def is_first_weights_partition_group(self) -> bool:
        return self.mesh.state_axes[1].rank == 0

    def is_sanity_checks_enabled(self) -> bool:
        return self._config.zero_config.enable_sanity_checks

    def load_universal_checkpoint(self) -> bool:
        return self._config.load_universal_checkpoint

    def log_level(self) -> Any:
        return self._config.log_level

    def loss_scale(self) -> float:
        return self._config.float16_config.loss_scale

    def managed_gradient_accumulation(self) -> bool:
        return self._config.managed_gradient_accumulation

    def memory_breakdown(self) -> bool:
        return self._config.memory_breakdown

    def mics_shard_size(self) -> int:
        return self._config.mics_shard_size

    def optimizer_legacy_fusion(self) -> bool:
        return self._config.optimizer_legacy_fusion

    def optimizer_name(self) -> Any:
        return (
            type(self.client_optimizer).__name__
            if self.client_optimizer
            else self._config.optimizer_name
        )

    def optimizer_params(self) -> Any:
        return self._config.optimizer_params

    def pld_enabled(self) -> bool:
        return self._config.pld_enabled

    def pld_gamma(self) -> float:
        return self.pld_params()["gamma"]

    def pld_params(self) -> Any:
        return self._config.pld_params

    def pld_theta(self) -> float:
        return self.pld_params()["theta"]

    def postscale_gradients(self) -> bool:
        return not self._config.prescale_gradients

    def quantize_training(self) -> Any:
        return self._config.compression_config["weight_quantization"]["shared_parameters"][
            "enabled"
        ]

    def random_ltd_config(self) -> Any:
        return self._config.data_efficiency_config["data_routing"]["random_ltd"]

    def random_ltd_enabled(self) -> bool:
        return self.random_ltd_config()["enabled"]

    def scheduler_name(self) -> Any:
        return self._config.scheduler_name

    def scheduler_params(self) -> Any:
        return self._config.scheduler_params

    def sparse_gradients_enabled(self) -> bool:
        return self._config.sparse_gradients_enabled

    def steps_per_print(self) -> Any:
        return self._config.steps_per_print

    def super_offload(self) -> bool:
        return _of(self._config.zero_config.offload_optimizer, "super_offload", False)

    def swap_tensor_config(self) -> Any:
        return None

    def tensor_parallel_config(self) -> Any:
        return self._config.tensor_parallel_config

    def torch_autocast_dtype(self) -> Any:
        return self._config.torch_autocast_dtype

    def torch_autocast_enabled(self) -> bool:
        return self._config.torch_autocast_enabled

    def torch_autocast_lower_precision_safe_modules(self) -> Any:
        return self._config.torch_autocast_lower_precision_safe_modules

    def train_batch_size(self) -> int:
        return self._config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._config.train_micro_batch_size_per_gpu

    def use_node_local_storage(self) -> bool:
        return self._config.use_node_local_storage

    def wall_clock_breakdown(self) -> bool:
        return self._config.wall_clock_breakdown

    def zenflow_config(self) -> Any:
        return self._config.zero_config.zenflow

    def zero_allgather_bucket_size(self) -> int:
        return self._config.zero_config.allgather_bucket_size

    def zero_allgather_partitions(self) -> bool:
        return self._config.zero_config.allgather_partitions

    def zero_allgather_sequential(self) -> bool:
        return self._config.zero_config.allgather_sequential

    def zero_allow_untested_optimizer(self) -> bool:
        return self._config.zero_allow_untested_optimizer

    def zero_contiguous_gradients(self) -> bool:
        return self._config.zero_config.contiguous_gradients

    def zero_cpu_offload(self) -> bool:
        return _device_of(self._config.zero_config.offload_optimizer) == "cpu"

    def zero_elastic_checkpoint(self) -> bool:
        return self._config.zero_config.elastic_checkpoint

    def zero_force_ds_cpu_optimizer(self) -> bool:
        return self._config.zero_force_ds_cpu_optimizer

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return self._config.zero_config.gather_16bit_weights_on_model_save

    def zero_grad_hooks(self) -> bool:
        return True

    def zero_hpz_partition_size(self) -> int:
        return self._config.zero_config.zero_hpz_partition_size

    def zero_ignore_unused_parameters(self) -> bool:
        return self._config.zero_config.ignore_unused_parameters

    def zero_legacy_stage1(self) -> bool:
        return self._config.zero_config.legacy_stage1

    def zero_load_from_fp32_weights(self) -> bool:
        return self._config.zero_config.load_from_fp32_weights

    def zero_log_trace_cache_warnings(self) -> bool:
        return self._config.zero_config.log_trace_cache_warnings

    def zero_max_live_parameters(self) -> int:
        return self._config.zero_config.max_live_parameters

    def zero_max_reuse_distance(self) -> int:
        return self._config.zero_config.max_reuse_distance

    def zero_model_persistence_threshold(self) -> int:
        return self._config.zero_config.model_persistence_threshold

    def zero_module_granularity_threshold(self) -> int:
        return self._config.zero_config.module_granularity_threshold

    def zero_multi_rank_bucket_allreduce(self) -> bool:
        return self._config.zero_config.use_multi_rank_bucket_allreduce

    def zero_nvme_offload_optimizer(self) -> bool:
        return _device_of(self._config.zero_config.offload_optimizer) == "nvme"

    def zero_offload_optimizer(self) -> Any:
        return self._config.zero_config.offload_optimizer

    def zero_offload_param(self) -> Any:
        return self._config.zero_config.offload_param

    def zero_optimization(self) -> bool:
        return self._config.zero_enabled

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() >= 3

    def zero_optimization_stage(self) -> int:
        return int(self._config.zero_optimization_stage)

    def zero_overlap_comm(self) -> bool:
        return self._config.zero_config.overlap_comm

    def zero_param_persistence_threshold(self) -> int:
        return self._config.zero_config.param_persistence_threshold

    def zero_partial_offload(self) -> float:
        return _of(self._config.zero_config.offload_optimizer, "ratio", 1.0)

    def zero_prefetch_bucket_size(self) -> int:
        return self._config.zero_config.prefetch_bucket_size

    def zero_quantized_gradients(self) -> bool:
        return self._config.zero_config.zero_quantized_gradients

    def zero_quantized_nontrainable_weights(self) -> bool:
        return self._config.zero_config.zero_quantized_nontrainable_weights

    def zero_quantized_weights(self) -> bool:
        return self._config.zero_config.zero_quantized_weights

    def zero_reduce_bucket_size(self) -> int:
        return self._config.zero_config.reduce_bucket_size

    def zero_reduce_scatter(self) -> bool:
        return self._config.zero_config.reduce_scatter

    def zero_round_robin_gradients(self) -> bool:
        return self._config.zero_config.round_robin_gradients

    def zero_save_muon_momentum_buffer_in_memory(self) -> bool:
        return self._config.zero_config.save_muon_momentum_buffer_in_memory

    def zero_sub_group_size(self) -> int:
        return self._config.zero_config.sub_group_size

    def zero_use_cpu_optimizer(self) -> bool:
        return _device_of(self._config.zero_config.offload_optimizer) in ("cpu", "nvme")

    def zeropp_loco_param(self) -> Any:
        return self._config.zero_config.zeropp_loco_param

    # - state

    def get_batch_info(self) -> tuple[Any, Any, Any]:
        """The three getters of the batch triad, as bound methods."""
        return (
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data.rank

    def get_lr(self) -> list[float]:
        """Learning rate of each group of the optimizer; [] without one."""
        return self._group_values("lr")

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_mom(self) -> list[Any]:
        """Momentum of each group (`betas` unless the optimizer is SGD or RMSprop)."""
        momentum = (
            isinstance(
                get_torch_optimizer(self.basic_optimizer), (torch.optim.SGD, torch.optim.RMSprop)
            )
            if self.basic_optimizer
            else False
        )
        return self._group_values("momentum" if momentum else "betas")

    def get_pld_theta(self) -> Any:
        return self.progressive_layer_drop.get_theta() if self.progressive_layer_drop else None

    def get_sequence_parallel_group(self) -> Any:
        return self.mesh.sequence.group

    def get_tensor_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_type(self) -> list[Any]:
        return self._group_values("type")

    def get_wall_clock_timers(self) -> dict[str, float]:
        """Milliseconds by timer name."""
        return {
            name: timer.elapsed(reset=False) for name, timer in self.timers.get_timers().items()
        }

    def _change_recovery_script_permissions(self, dst: str) -> None:
        """Let everybody run the script that a save puts beside the tags."""
        make_executable(Path(dst))

    def _get_zero_param_shapes(self) -> list[dict[str, torch.Size]]:
        """Shapes by name of each group's parameters, as they are in the sharded optimizer's flat tensors."""
        return list(param_shapes(self.optimizer))

    def _get_optimizer_ckpt_name(self, checkpoints_path: str, tag: str, expp_rank: int) -> str:
        """Path of the states of an optimizer that is not sharded, beside those of experts."""
        name = expert_optim_file(expp_rank, self.mesh.tensor.rank)
        return os.path.join(checkpoints_path, str(tag), name)

    def _group_values(self, key: str) -> list[Any]:
        groups = self.basic_optimizer.param_groups if self.basic_optimizer is not None else []
        return [group.get(key, 0.0) for group in groups]


def _of(section: Any, name: str, default: Any) -> Any:
    return default if section is None else getattr(section, name)


def _device_of(section: Any) -> str:
    return "none" if section is None else str(getattr(section.device, "value", section.device))
