# SPDX-License-Identifier: Apache-2.0
"""The names that integrations reach for on an engine and on its optimizers."""

from __future__ import annotations

import pytest
import torch

import deepspeed

ATTRIBUTES = """
module optimizer basic_optimizer lr_scheduler training_dataloader config mpu device local_rank global_rank world_size
dp_world_size mp_world_size seq_dp_world_size sequence_parallel_size data_parallel_group seq_data_parallel_group
expert_parallel_group expert_data_parallel_group global_steps global_samples micro_steps skipped_steps
gas_boundary_ctr loaded_checkpoint_mp_world_size loaded_checkpoint_dp_world_size enable_backward_allreduce
inside_no_sync_ctxt has_moe_layers num_experts gate_modules moe_layers monitor timers tput_timer checkpoint_engine
compression_scheduler quantizer progressive_layer_drop curriculum_scheduler_legacy random_ltd_scheduler
save_non_zero_checkpoint save_zero_checkpoint pipeline_parallelism losses client_optimizer client_lr_scheduler
training_data collate_fn sparse_tensor_module_names param_names mesh_device
"""
METHODS = """
coalesce_grad_reduction scale no_sync allreduce_gradients set_gradient_accumulation_boundary was_step_applied
get_type get_mom get_lr set_train_batch_size set_train_micro_batch_size set_data_post_process_func
set_custom_curriculum_learning_schedule deepspeed_io load_module_state_dict module_state_dict save_16bit_model
save_fp16_model _zero3_consolidated_16bit_state_dict _consolidated_16bit_state_dict empty_partition_cache
is_map_style_dataset is_iterable_style_dataset compile is_deepcompile_enabled is_deepcompile_active get_compile_time
register_compile_pass destroy get_wall_clock_timers get_batch_info get_data_parallel_rank get_tensor_parallel_rank
get_model_parallel_rank get_sequence_parallel_group offload_states reload_states get_global_grad_norm zero_grad
"""
COMMON = """
param_groups state step zero_grad state_dict load_state_dict loss_scale overflow set_lr get_lr refresh_fp32_params
backward optimizer clip_grad offload_states reload_states override_loss_scale
"""
BY_STAGE = {
    1: "bit16_groups bit16_groups_flat round_robin_bit16_groups single_partition_of_fp32_groups "
    "parallel_partitioned_bit16_groups averaged_gradients partition_gradients dp_process_group "
    "real_dp_process_group partition_count update_lp_params cur_scale",
    3: "fp16_groups fp16_partitioned_groups_flat fp32_partitioned_groups_flat parameter_offload "
    "persistent_parameters swap_optimizer get_full_hp_param set_full_hp_param get_fp32_grad_for_param "
    "set_fp32_grad_for_param checkpoint_event_prologue checkpoint_event_epilogue destroy",
}


def engine_of(stage, **zero):
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
    }
    return deepspeed.initialize(model=torch.nn.Linear(4, 3), config=config)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_engine_and_optimizer_have_the_names_that_others_use(stage):
    engine = engine_of(stage)
    assert [name for name in ATTRIBUTES.split() if not hasattr(engine, name)] == []
    assert [name for name in METHODS.split() if not callable(getattr(engine, name, None))] == []
    names = f"{COMMON} {BY_STAGE[3 if stage == 3 else 1]}".split()
    assert [name for name in names if not hasattr(engine.optimizer, name)] == []


def test_kinds_of_datasets_are_told_apart():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    engine = engine_of(0)
    assert engine.is_map_style_dataset([1, 2]) and not engine.is_map_style_dataset(Stream())
    assert engine.is_iterable_style_dataset(Stream()) and not engine.is_iterable_style_dataset([1])


def test_an_engine_that_was_not_compiled_knows_of_no_graphs_and_takes_passes():
    engine = engine_of(0)
    assert engine.get_compile_time() == [] and not engine.is_deepcompile_active()
    engine.register_compile_pass("mine", lambda graph: graph)
    with pytest.raises(NotImplementedError, match="needs DeepCompile"):
        engine.compile(schedule=[(0, ["mine"])])


def test_whole_states_of_a_param_through_the_stage_3_optimizer():
    engine = engine_of(3, stage3_param_persistence_threshold=0)
    optimizer, weight = engine.optimizer, engine.module.weight
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
    grad = optimizer.get_fp32_grad_for_param(weight)
    assert torch.equal(grad, torch.ones(3, 4))
    optimizer.set_fp32_grad_for_param(torch.zeros(3, 4), weight)
    bias = optimizer.get_full_hp_param(engine.module.bias).clone()
    engine.step()
    assert not torch.equal(optimizer.get_full_hp_param(engine.module.bias), bias)
    assert torch.equal(optimizer.get_full_hp_param(weight, "exp_avg"), torch.zeros(3, 4))
    optimizer.set_full_hp_param(torch.full((3, 4), 2.0), weight)
    optimizer.set_full_hp_param(torch.full((3, 4), 0.5), weight, "exp_avg")
    assert torch.equal(optimizer.get_full_hp_param(weight), torch.full((3, 4), 2.0))
    assert torch.equal(optimizer.get_full_hp_param(weight, "exp_avg"), torch.full((3, 4), 0.5))
    optimizer.checkpoint_event_prologue()
    assert weight.numel() == 0
    optimizer.checkpoint_event_epilogue()
    with deepspeed.zero.GatheredParameters([weight]):
        assert torch.equal(weight, torch.full((3, 4), 2.0, dtype=torch.bfloat16))
