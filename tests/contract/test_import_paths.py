# SPDX-License-Identifier: Apache-2.0
"""Import paths that programs rely on: the built ones import, the others work or fail with an error that names them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# module -> names in it; all of it is there
BUILT = {
    "deepspeed.pipe": "PipelineModule LayerSpec TiedLayerSpec",
    "deepspeed.runtime.quantize": "Quantizer",
    "deepspeed.runtime.weight_quantizer": "WeightQuantization",
    "deepspeed.runtime.pipe.engine": "PipelineEngine",
    "deepspeed.runtime.pipe.module": "PipelineModule LayerSpec TiedLayerSpec PipelineError",
    "deepspeed.runtime.pipe.schedule": (
        "PipeSchedule InferenceSchedule TrainSchedule DataParallelSchedule OptimizerStep "
        "ReduceGrads ReduceTiedGrads LoadMicroBatch ForwardPass BackwardPass SendActivation "
        "RecvActivation SendGrad RecvGrad"
    ),
    "deepspeed.runtime.pipe.topology": (
        "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology "
        "PipelineParallelGrid"
    ),
    "deepspeed.runtime.sequence_parallel.parallel_state_sp": "initialize_sequence_parallel",
    "deepspeed.runtime.sequence_parallel.ulysses_sp": (
        "UlyssesSPAttentionHF UlyssesSPDataLoaderAdapter SequenceTiledCompute TiledMLP "
        "TiledFusedLogitsLoss AutogradComputeMLP sequence_tiled_compute"
    ),
    "deepspeed.sequence.cross_entropy": "vocab_sequence_parallel_cross_entropy",
    "deepspeed.sequence.fpdt_layer": (
        "FPDT_InputConstruct FPDT_Attention FPDT_FFN FPDT_LogitsLoss SequenceChunk"
    ),
    "deepspeed.sequence.layer": "DistributedAttention _SeqAllToAll single_all_to_all",
    "deepspeed": (
        "PipelineModule PipelineEngine pipe sequence __version__ version __version_major__ __version_minor__ __version_patch__ __git_hash__ "
        "__git_branch__ git_hash git_branch initialize init_inference init_distributed "
        "tp_model_init add_config_arguments default_inference_config add_tuning_arguments set_optimizer_flags DeepSpeedHybridEngine "
        "DeepSpeedEngine DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable "
        "DeepSpeedOptimizer DeepSpeedDataLoader DeepSpeedConfig DeepSpeedConfigError "
        "DeepSpeedInferenceConfig ADAM_OPTIMIZER LAMB_OPTIMIZER MUON_OPTIMIZER "
        "TORCH_DISTRIBUTED_DEFAULT_PORT OnDevice logger log_dist is_compile_supported zero ops "
        "get_accelerator HAS_TRITON dist comm moe monitor profiling autotuning elasticity "
        "compression checkpoint nebula launcher inference runtime utils accelerator constants "
        "git_version_info compile checkpointing linear InferenceEngine module_inject "
        "replace_transformer_layer revert_transformer_layer set_autotp_mode "
        "DeepSpeedTransformerLayer DeepSpeedTransformerConfig domino"
    ),
    "deepspeed.accelerator": "get_accelerator set_accelerator DeepSpeedAccelerator",
    "deepspeed.autotuning": "Autotuner ResourceManager",
    "deepspeed.autotuning.config": "DeepSpeedAutotuningConfig",
    "deepspeed.checkpoint": (
        "get_layer_ckpt_name_for_rank get_model_ckpt_name_for_rank get_zero_ckpt_name_for_rank "
        "reshape_meg_2d_parallel DeepSpeedCheckpoint merge_state model_3d_desc "
        "get_model_3d_descriptor ZeROCheckpoint enable_universal_checkpoint SubparamShape"
    ),
    "deepspeed.checkpoint.autoep_universal": (
        "_zero12_fragment_path consolidate_autoep_expert_files "
        "consolidate_autoep_zero12_expert_states make_folding_metadata validate_folding_metadata"
    ),
    "deepspeed.checkpoint.ds_to_universal": (
        "main parse_arguments _autoep_expert_param_names_by_rank "
        "_get_zero3_model_state_files _uses_zero3_partitioned_autoep_metadata"
    ),
    "deepspeed.checkpoint.universal_checkpoint": "SubparamShape load_hp_checkpoint_state",
    "deepspeed.checkpoint.constants": (
        "AUTOEP_LAYERS_KEY AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY "
        "AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION_KEY "
        "AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT BUFFER_NAMES EP_IS_EXPERT_PARAM "
        "EP_NUM_EXPERTS FOLDING_DISPATCH_STRATEGY FOLDING_EP_SIZE FOLDING_ETP_RANK "
        "FOLDING_ETP_SIZE FOLDING_FAMILY FOLDING_METADATA_KEY FOLDING_PARAM_FAMILIES "
        "FOLDING_SHARED_EXPERT_PLACEMENT FOLDING_TP_SIZE FOLDING_ZERO_PARTITION_COUNT "
        "FOLDING_ZERO_PARTITION_GROUP OPTIMIZER_STATE_DICT PARAM PARAM_SHAPES"
    ),
    "deepspeed.checkpoint.utils": "clone_tensors_for_torch_save",
    "deepspeed.comm": (
        "configure is_initialized destroy_process_group new_group is_available broadcast "
        "broadcast_object_list all_gather all_gather_object has_reduce_scatter_tensor "
        "reduce_scatter_fn reduce_scatter_tensor all_gather_into_tensor "
        "has_all_gather_into_tensor allgather_fn all_to_all_single all_to_all send recv isend "
        "irecv gather scatter barrier monitored_barrier log_summary reset_log has_comm_data "
        "get_comm_operation_count get_logged_comm_ops reduce reduce_scatter "
        "has_all_reduce_coalesced has_coalescing_manager all_gather_coalesced all_reduce "
        "inference_all_reduce all_reduce_coalesced get_world_group get_world_size get_rank "
        "get_local_rank get_global_rank get_all_ranks_from_group initialize_mesh_device "
        "enable_symm_mem_for_group mpi_discovery in_aml in_aws_sm in_dlts init_distributed "
        "ProcessGroup ReduceOp"
    ),
    "deepspeed.comm.backend": "Backend",
    "deepspeed.comm.ccl": "CCLBackend",
    "deepspeed.comm.config": "CommsLoggerConfig DeepSpeedCommsConfig",
    "deepspeed.comm.reduce_op": "ReduceOp",
    "deepspeed.comm.torch": "TorchBackend",
    "deepspeed.compression": "init_compression redundancy_clean convert_conv1d_to_linear compression_scheduler",
    "deepspeed.compression.basic_layer": (
        "QuantAct LinearLayer_Compress Embedding_Compress Conv2dLayer_Compress BNLayer_Compress "
        "ColumnParallelLinear_Compress RowParallelLinear_Compress"
    ),
    "deepspeed.compression.compress": "init_compression redundancy_clean student_initialization",
    "deepspeed.compression.config": "get_compression_config",
    "deepspeed.compression.helper": (
        "recursive_getattr recursive_setattr convert_conv1d_to_linear module_replacement is_module_compressible"
    ),
    "deepspeed.compression.scheduler": "compression_scheduler",
    "deepspeed.compression.utils": (
        "TopKBinarizer SymQuantizer AsymQuantizer TernaryQuantizer BinaryQuantizer"
    ),
    "deepspeed.constants": (
        "TORCH_DISTRIBUTED_DEFAULT_PORT INFERENCE_GENERIC_MODE INFERENCE_SPECIALIZED_MODE "
        "CROSS_RANK CROSS_SIZE default_pg_timeout"
    ),
    "deepspeed.elasticity": (
        "DSElasticAgent compute_elastic_config elasticity_enabled ensure_immutable_elastic_config "
        "ElasticityError ElasticityConfigError ElasticityIncompatibleWorldSize"
    ),
    "deepspeed.env_report": "cli_main main",
    "deepspeed.git_version_info": "version git_hash git_branch",
    "deepspeed.inference": (
        "InferenceEngine DeepSpeedInferenceConfig InferenceEngineV2 RaggedInferenceEngineConfig "
        "build_hf_engine build_engine_from_ds_checkpoint"
    ),
    "deepspeed.inference.config": "DeepSpeedInferenceConfig DtypeEnum",
    "deepspeed.inference.engine": "InferenceEngine",
    "deepspeed.inference.quantization.layers": (
        "QuantizedEmbedding QuantizedLinear QUANTIZATION_LAYER_MAPPINGS"
    ),
    "deepspeed.inference.quantization.quantization": "_init_group_wise_weight_quantization",
    "deepspeed.inference.quantization.quantization_context": "QuantizationContext",
    "deepspeed.inference.quantization.utils": "DeQuantizer Quantizer",
    "deepspeed.inference.v2": (
        "build_hf_engine build_engine_from_ds_checkpoint InferenceEngineV2 RaggedInferenceEngineConfig"
    ),
    "deepspeed.inference.v2.engine_v2": "InferenceEngineV2",
    "deepspeed.inference.v2.engine_factory": "build_hf_engine build_engine_from_ds_checkpoint",
    "deepspeed.inference.v2.config_v2": "RaggedInferenceEngineConfig DeepSpeedTPConfig",
    "deepspeed.inference.v2.ragged": "DSStateManagerConfig DSStateManager BlockedAllocator",
    "deepspeed.inference.v2.scheduling_utils": "SchedulingResult SchedulingError",
    "deepspeed.io": "FastFileWriter FastFileWriterConfig PyFileWriter MockFileWriter",
    "deepspeed.launcher.launch": "main",
    "deepspeed.launcher.runner": "main DEEPSPEED_ENVIRONMENT_NAME DLTS_HOSTFILE EXPORT_ENVS",
    "deepspeed.linear": "OptimizedLinear LoRAConfig QuantizationConfig Init init_lora",
    "deepspeed.moe.ep_count": "count_tokens_per_expert",
    "deepspeed.moe.ep_experts": "GroupedExperts",
    "deepspeed.moe.ep_kernels": "",
    "deepspeed.moe.ep_repack": "repack_expert_weights",
    "deepspeed.moe.ep_router": "TokenChoiceTopKRouter",
    "deepspeed.moe.ep_tp_dispatch": (
        "RoutedAssignmentPayload assert_tp_payload_consistent assignment_ordinals_by_expert dist "
        "dispatch_counters partition_assignments restore_combined"
    ),
    "deepspeed.moe.experts": "Experts",
    "deepspeed.moe.fused_expert_layout": "classify_fused_gate_up_layout",
    "deepspeed.moe.layer": "MoE",
    "deepspeed.moe.mappings": "gather_tokens drop_tokens",
    "deepspeed.moe.sharded_moe": (
        "top1gating top2gating topkgating TopKGate MOELayer _AllToAll gumbel_rsample "
        "multiplicative_jitter"
    ),
    "deepspeed.moe.utils": (
        "has_moe_layers is_moe_param split_params_into_shared_and_expert_params "
        "split_params_grads_into_shared_and_expert_params "
        "split_params_into_different_moe_groups_for_optimizer is_moe_param_group "
        "configure_moe_param_groups"
    ),
    "deepspeed.module_inject": (
        "replace_transformer_layer revert_transformer_layer LinearAllreduce LinearLayer set_autotp_mode "
        "SubParamLinearLayer SubParamLinearAllreduce TPLayerSpec AutoTPConfig PartitionType "
        "AutoTPPresets merge_autotp_configs DSPolicy EmbeddingLayer GroupQuantizer HFBertLayerPolicy Normalize "
        "ReplaceWithTensorSlicing generic_injection quantize_transformer_layer"
    ),
    "deepspeed.module_inject.replace_policy": "HFBertLayerPolicy replace_policies",
    "deepspeed.module_inject.auto_ep": "AutoEP _resolve_route_scale",
    "deepspeed.module_inject.auto_ep_config": (
        "AutoEPConfig MoELayerSpec PRESET_MODELS fill_autoep_config_from_hf parse_autoep_config "
        "validate_autoep_config validate_autoep_post_detection"
    ),
    "deepspeed.module_inject.auto_ep_folding": (
        "AUTOEP_FOLDING_GRAD_REDUCE_AVERAGE AUTOEP_FOLDING_GRAD_REDUCE_EXPERT_TP_CANCEL "
        "AUTOEP_FOLDING_GRAD_REDUCE_SKIP AUTOEP_FOLDING_GRAD_REDUCE_SUM FoldingGroupHandles "
        "FoldingGroupTables ParallelFoldingSpec assert_group_matches_spec "
        "autoep_folding_gradient_reduction_strategy build_folding_spec "
        "expected_folding_group_tables local_folding_ranks "
        "mark_autoep_folding_partial_router_parameter mark_autoep_folding_router_parameter "
        "mark_autoep_folding_sp_sharded_layernorm_parameter"
    ),
    "deepspeed.module_inject.auto_ep_layer": (
        "AutoEPMoELayer SplitPlan apply_scores_before_experts_if_enabled combine_from_routed "
        "compute_split_plan compute_split_plan_from_expert_indices dist resolve_score_apply_mode"
    ),
    "deepspeed.module_inject.auto_ep_preset_adapters": "get_preset_adapter",
    "deepspeed.module_inject.auto_ep_presets.base": "MoEModelPreset",
    "deepspeed.module_inject.auto_ep_presets.registry": (
        "PRESET_MODELS preset_name_for_hf_model_type unsupported_preset_for_hf_model_type"
    ),
    "deepspeed.module_inject.auto_tp": "AutoTP",
    "deepspeed.module_inject.layers": (
        "GatherReplacedLayerParams LinearAllreduce LinearLayer LmHeadLinearAllreduce "
        "fused_LinearLayer GateUpPack_LinearLayer"
    ),
    "deepspeed.module_inject.tp_shard": "get_shard_size get_shard_size_list set_num_kv_heads",
    "deepspeed.monitor.comet": "CometMonitor",
    "deepspeed.monitor.config": "get_monitor_config TensorBoardConfig",
    "deepspeed.monitor.csv_monitor": "csvMonitor",
    "deepspeed.monitor.monitor": "MonitorMaster",
    "deepspeed.monitor.tensorboard": "TensorBoardMonitor",
    "deepspeed.monitor.wandb": "WandbMonitor",
    "deepspeed.nebula.config": "DeepSpeedNebulaConfig",
    "deepspeed.nvme": "",
    "deepspeed.ops": "__compatible_ops__",
    "deepspeed.ops.adagrad": "DeepSpeedCPUAdagrad",
    "deepspeed.ops.adam": "DeepSpeedCPUAdam FusedAdam ZenFlowCPUAdam ZenFlowSelectiveAdamW "
    "ZenFlowSelectiveAdamW_stage3",
    "deepspeed.ops.aio": "AsyncIOBuilder",
    "deepspeed.ops.fp_quantizer": "FP_Quantize Quantizer matmul_fp8",
    "deepspeed.ops.quantizer": "ds_quantizer",
    "deepspeed.ops.random_ltd": "GatherTokens ScatterTokens bert_sample_tokens gpt_sample_tokens",
    "deepspeed.ops.lamb": "FusedLamb",
    "deepspeed.ops.lion": "DeepSpeedCPULion FusedLion",
    "deepspeed.ops.deepspeed4science": "DS4Sci_EvoformerAttention",
    "deepspeed.ops.sparse_attention": (
        "SparsityConfig DenseSparsityConfig FixedSparsityConfig VariableSparsityConfig BigBirdSparsityConfig "
        "BSLongformerSparsityConfig LocalSlidingWindowSparsityConfig SparseSelfAttention BertSparseSelfAttention "
        "SparseAttentionUtils MatMul Softmax"
    ),
    "deepspeed.ops.transformer": "DeepSpeedTransformerLayer DeepSpeedTransformerConfig",
    "deepspeed.ops.op_builder": "CPUAdamBuilder FusedAdamBuilder AsyncIOBuilder",
    "deepspeed.profiling.config": "DeepSpeedFlopsProfilerConfig",
    "deepspeed.profiling.flops_profiler": (
        "get_model_profile FlopsProfiler number_to_string flops_to_string macs_to_string "
        "params_to_string duration_to_string bytes_to_string"
    ),
    "deepspeed.profiling.flops_profiler.profiler": "get_model_profile FlopsProfiler",
    "deepspeed.runtime.activation_checkpointing.checkpointing": (
        "checkpoint non_reentrant_checkpoint configure is_configured reset get_cuda_rng_tracker "
        "model_parallel_cuda_manual_seed model_parallel_reconfigure_tp_seed "
        "partition_activations_in_checkpoint set_num_layers CheckpointFunction _set_cuda_rng_state"
    ),
    "deepspeed.runtime.base_optimizer": "DeepSpeedOptimizer ZeROOptimizer",
    "deepspeed.runtime.bf16_optimizer": "BF16_Optimizer",
    "deepspeed.runtime.checkpoint_engine": (
        "CheckpointEngine CheckpointCommitInfo TorchCheckpointEngine FastCheckpointEngine "
        "DecoupledCheckpointEngine create_checkpoint_engine"
    ),
    "deepspeed.runtime.checkpoint_engine.decoupled_checkpoint_engine": "DecoupledCheckpointEngine",
    "deepspeed.runtime.checkpoint_engine.fast_checkpoint_engine": "FastCheckpointEngine",
    "deepspeed.runtime.checkpoint_engine.checkpoint_engine": "CheckpointEngine",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine": "TorchCheckpointEngine",
    "deepspeed.runtime.compiler": (
        "is_compile_supported disable enable is_compiling compiled_autograd"
    ),
    "deepspeed.runtime.fp16.onebit.adam": "OnebitAdam",
    "deepspeed.runtime.fp16.onebit.lamb": "OnebitLamb",
    "deepspeed.runtime.fp16.onebit.zoadam": "ZeroOneAdam",
    "deepspeed.sequence.auto_sp": "auto_wrap_model_for_sp",
    "deepspeed.runtime.hybrid_engine": "DeepSpeedHybridEngine",
    "deepspeed.runtime.rollout": (
        "RolloutConfig SamplingConfig RolloutRequest RolloutBatch RolloutEngine HybridEngineRollout"
    ),
    "deepspeed.runtime.zero.muon.muon_optimizer": "MuonWithAuxAdam",
    "deepspeed.runtime.zero.muon.original_muon": (
        "Muon SingleDeviceMuon MuonWithAuxAdam SingleDeviceMuonWithAuxAdam"
    ),
    "deepspeed.runtime.config": (
        "DeepSpeedConfig DeepSpeedConfigError ADAM_OPTIMIZER LAMB_OPTIMIZER MUON_OPTIMIZER "
        "DEEPSPEED_OPTIMIZERS DtypeEnum"
    ),
    "deepspeed.runtime.config_utils": (
        "DeepSpeedConfigModel dict_raise_error_on_duplicate_keys get_scalar_param "
        "ScientificNotationEncoder pp_int"
    ),
    "deepspeed.runtime.constants": "ROUTE_TRAIN ROUTE_EVAL ROUTE_PREDICT",
    "deepspeed.runtime.dataloader": "RepeatingLoader DeepSpeedDataLoader",
    "deepspeed.runtime.engine": "DeepSpeedEngine",
    "deepspeed.runtime.fp16.fused_optimizer": "FP16_Optimizer",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler CreateLossScaler",
    "deepspeed.runtime.fp16.unfused_optimizer": "FP16_UnfusedOptimizer",
    "deepspeed.runtime.lr_schedules": (
        "LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR VALID_LR_SCHEDULES "
        "add_tuning_arguments get_config_from_args get_lr_from_config override_params "
        "update_lr get_torch_optimizer"
    ),
    "deepspeed.runtime.precision_config": "DeepSpeedFP16Config DeepSpeedBF16Config",
    "deepspeed.runtime.data_pipeline.curriculum_scheduler": "CurriculumScheduler",
    "deepspeed.runtime.data_pipeline.data_routing.basic_layer": "RandomLayerTokenDrop",
    "deepspeed.runtime.data_pipeline.data_routing.helper": (
        "convert_to_random_ltd save_without_random_ltd remove_random_ltd_state_dict"
    ),
    "deepspeed.runtime.data_pipeline.data_routing.scheduler": "BaseScheduler RandomLTDScheduler",
    "deepspeed.runtime.data_pipeline.data_sampling.data_analyzer": (
        "DataAnalyzer DistributedDataAnalyzer"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling.data_sampler": "DeepSpeedDataSampler",
    "deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset": (
        "MMapIndexedDataset MMapIndexedDatasetBuilder IndexedDataset IndexedCachedDataset "
        "IndexedDatasetBuilder make_builder make_dataset"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling.utils": (
        "find_fit_int_dtype split_index split_dataset create_mmap_dataset_builder "
        "close_mmap_dataset_builder"
    ),
    "deepspeed.runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": (
        "batch_by_seqlens scale_lr dataloader_for_variable_batch_size VariableBatchSizeLR "
        "lr_scheduler_for_variable_batch_size "
        "get_dataloader_and_lr_scheduler_for_variable_batch_size "
        "get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed"
    ),
    "deepspeed.runtime.domino.transformer": "DominoTransformer DominoTransformerLayer",
    "deepspeed.runtime.eigenvalue": "Eigenvalue",
    "deepspeed.runtime.progressive_layer_drop": "ProgressiveLayerDrop",
    "deepspeed.runtime.sparse_tensor": "SparseTensor",
    "deepspeed.runtime.state_dict_factory": "SDLoaderFactory MegatronSDLoader",
    "deepspeed.runtime.swap_tensor": "",
    "deepspeed.runtime.utils": (
        "see_memory_usage memory_status clip_grad_norm_ get_global_norm CheckOverflow "
        "set_random_seed move_to_device partition_uniform partition_balanced "
        "PartitionedTensor DummyOptim noop_decorator required_torch_version empty_cache "
        "ensure_directory_exists call_to_str get_weight_norm"
    ),
    "deepspeed.runtime.superoffload": "",
    "deepspeed.runtime.zenflow": "",
    "deepspeed.runtime.zenflow.zenflow_utils": "_split_affinity",
    "deepspeed.runtime.zero": (
        "ZeroParamType ZeroParamStatus Init GatheredParameters register_external_parameter "
        "TiledLinear TiledLinearReturnBias DeepSpeedZeRoOffload DeepSpeedTensorOverride MiCS_Init "
        "unwrap_model_for_generation"
    ),
    "deepspeed.runtime.zero.config": "DeepSpeedZeroConfig ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config": (
        "OffloadDeviceEnum OffloadStateTypeEnum DeepSpeedZeroOffloadParamConfig "
        "DeepSpeedZeroOffloadOptimizerConfig"
    ),
    "deepspeed.runtime.zero.mics": "MiCS_Init",
    "deepspeed.runtime.zero.parameter_offload": "DeepSpeedZeRoOffload",
    "deepspeed.runtime.zero.partition_parameters": (
        "ZeroParamType ZeroParamStatus Init GatheredParameters register_external_parameter "
        "unregister_external_parameter is_zero_param shutdown_init_context restore_init_context "
        "free_param DeepSpeedTensorOverride zero_wrapper_for_fp_tensor_constructor "
        "_orig_torch_arange get_accelerator"
    ),
    "deepspeed.runtime.zero.stage3": (
        "DeepSpeedZeroOptimizer_Stage3 estimate_zero3_model_states_mem_needs "
        "estimate_zero3_model_states_mem_needs_all_live "
        "estimate_zero3_model_states_mem_needs_all_cold"
    ),
    "deepspeed.runtime.zero.stage_1_and_2": (
        "DeepSpeedZeroOptimizer estimate_zero2_model_states_mem_needs "
        "estimate_zero2_model_states_mem_needs_all_live "
        "estimate_zero2_model_states_mem_needs_all_cold"
    ),
    "deepspeed.runtime.zero.tiling": "TiledLinear TiledLinearReturnBias",
    "deepspeed.utils": (
        "logger log_dist log_dist_once set_log_level_from_string get_caller_func OnDevice "
        "groups instrument_w_nvtx tensor_fragment get_full_hp_param get_hp_fragment_mapping "
        "fragment_address get_full_hp_grad safe_get_full_fp32_param "
        "safe_get_full_optimizer_state safe_get_full_grad safe_set_full_fp32_param "
        "safe_set_full_optimizer_state safe_set_full_grad safe_get_local_fp32_param "
        "safe_get_local_grad safe_get_local_optimizer_state safe_set_local_fp32_param "
        "safe_set_local_grad safe_set_local_optimizer_state safe_update_full_grad_vectorized "
        "set_full_hp_param set_full_hp_grad RepeatingLoader get_numactl_cmd get_z3_leaf_modules "
        "set_z3_leaf_module set_z3_leaf_modules set_z3_leaf_modules_by_name "
        "set_z3_leaf_modules_by_suffix unset_z3_leaf_modules z3_leaf_module z3_leaf_parameter"
    ),
    "deepspeed.utils.bwc": (
        "bwc_tensor_model_parallel_world_size bwc_tensor_model_parallel_rank "
        "bwc_tensor_model_parallel_group"
    ),
    "deepspeed.utils.debug": "",
    "deepspeed.utils.exceptions": "",
    "deepspeed.utils.groups": (
        "initialize get_tensor_model_parallel_group get_tensor_model_parallel_world_size "
        "get_tensor_model_parallel_rank set_tensor_model_parallel_world_size "
        "set_tensor_model_parallel_rank get_model_parallel_group get_model_parallel_rank "
        "get_model_parallel_world_size get_data_parallel_group get_data_parallel_rank "
        "get_data_parallel_world_size get_tensor_model_parallel_src_rank "
        "_create_model_parallel _create_expert_and_data_parallel "
        "_create_expert_data_and_model_parallel _get_max_expert_size "
        "_get_max_expert_size_name _get_expert_parallel_group _get_expert_parallel_group_dict "
        "_get_expert_parallel_world_size _get_expert_parallel_rank "
        "_get_expert_parallel_src_rank _get_expert_data_parallel_group "
        "_get_expert_data_parallel_group_dict _get_expert_data_parallel_world_size "
        "_get_expert_data_parallel_rank _clone_world_group _get_local_all_to_all_group "
        "_get_data_parallel_group _get_data_parallel_group_ranks "
        "_get_data_parallel_world_size _get_data_parallel_rank _get_broadcast_src_rank "
        "_get_expert_broadcast_src_rank _get_model_parallel_world_size "
        "_get_model_parallel_rank _get_model_parallel_group _get_sequence_parallel_world_size "
        "_get_sequence_parallel_rank _get_sequence_parallel_group "
        "_get_sequence_data_parallel_world_size _get_sequence_data_parallel_rank "
        "_get_sequence_data_parallel_group _get_expert_model_parallel_world_size "
        "_create_zero_param_parallel_group _get_zero_param_intra_parallel_group "
        "_get_zero_param_intra_parallel_rank_in_mygroup "
        "_get_zero_param_intra_parallel_group_world_size _init_tp_mesh_device mesh_device"
    ),
    "deepspeed.utils.logging": "logger log_dist print_dist print_json_dist",
    "deepspeed.utils.module": "recursive_getattr recursive_setattr",
    "deepspeed.utils.numa": "get_numactl_cmd",
    "deepspeed.utils.tensor_fragment": "",
    "deepspeed.utils.timer": (
        "SynchronizedWallClockTimer NoopTimer ThroughputTimer FORWARD_GLOBAL_TIMER "
        "BACKWARD_GLOBAL_TIMER STEP_GLOBAL_TIMER"
    ),
    "deepspeed.utils.torch": "required_torch_version",
    "deepspeed.utils.zero_to_fp32": (
        "get_fp32_state_dict_from_zero_checkpoint convert_zero_checkpoint_to_fp32_state_dict "
        "load_state_dict_from_zero_checkpoint get_model_state_file get_optim_files parse_model_states "
        "_raise_if_autoep_zero3_partitioned_checkpoint"
    ),
}

# module -> names that come with later work; a row moves up when it is built
LATER = {
    "deepspeed.runtime.sequence_parallel.ulysses_sp": "TiledLoss UlyssesSPFwdLossBwdWithLogits",
    "deepspeed.utils": "lazy_init_hp_params_optimizer_state link_hp_params map_to_flat_opt_states",
}


@pytest.mark.parametrize("module", BUILT)
def test_built_path_imports_with_its_names(module):
    found = importlib.import_module(module)
    missing = [name for name in BUILT[module].split() if not hasattr(found, name)]
    assert missing == []


@pytest.mark.parametrize("module", LATER)
def test_path_of_later_work_imports_or_says_what_is_missing(module):
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # the path itself is missing, or a package above it: not something it needs inside
        assert error.name is not None and module.startswith(error.name)
        return
    for name in LATER[module].split():
        try:
            getattr(found, name)
        except (AttributeError, ModuleNotFoundError) as error:
            assert name in str(error) or str(error.name).startswith("deepspeed."), name


def test_no_name_is_listed_as_built_and_as_later():
    for module in BUILT.keys() & LATER.keys():
        assert not set(BUILT[module].split()) & set(LATER[module].split()), module


def test_each_built_module_imports_alone():
    """Each starts from nothing but the ops, which torch lets register only once per process."""
    probe = (
        "import importlib, json, sys\n"
        "failed = {}\n"
        "for name in sys.argv[1:]:\n"
        "    for loaded in [m for m in sys.modules if m.startswith('deepspeed') and '.ops' not in m]:\n"
        "        del sys.modules[loaded]\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception as error:\n"
        "        failed[name] = repr(error)\n"
        "print(json.dumps(failed))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", probe, *BUILT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert json.loads(out.stdout.splitlines()[-1]) == {}
