# SPDX-License-Identifier: Apache-2.0
"""Legacy names of the checkpoint format, for scripts that were copied beside older checkpoints and import them."""

from __future__ import annotations

from .format import Model, Optim, Universal, Zero

# ------------------------------------------------------------------ optimizer shards
OPTIMIZER_STATE_DICT = Optim.STATE
FP32_GROUPS = Zero.WRAPPER_LISTS
FP32_FLAT_GROUPS = Zero.FP32_FLAT_GROUPS
BASE_OPTIMIZER_STATE = Zero.BASE_STATE
BASE_OPTIMIZER_STATE_STEP = Zero.BASE_STATE_STEP
SINGLE_PARTITION_OF_FP32_GROUPS = Zero.FP32_GROUPS
PARAM_GROUPS = "param_groups"
GROUP_PADDINGS = Zero.GROUP_PADDINGS
PARTITION_COUNT = Zero.PARTITION_COUNT
ZERO_STAGE = Zero.STAGE
CLIP_GRAD = Zero.CLIP_GRAD
PARAM_SLICE_MAPPINGS = Zero.SLICE_MAPPINGS
LOSS_SCALER = Zero.LOSS_SCALER

# ------------------------------------------------------------------ model states
PARAM = "param"
PARAM_SHAPES = Model.PARAM_SHAPES
BUFFER_NAMES = Model.BUFFER_NAMES
FROZEN_PARAM_SHAPES = Model.FROZEN_PARAM_SHAPES
FROZEN_PARAM_FRAGMENTS = Model.FROZEN_PARAM_FRAGMENTS
SHARED_PARAMS = Model.SHARED_PARAMS
DS_CONFIG = Model.DS_CONFIG
DS_VERSION = Model.DS_VERSION
CHECKPOINT_PARALLEL_DIMS = Model.PARALLEL_DIMENSIONS
CHECKPOINT_PP_DEGREE = "pp_degree"
CHECKPOINT_TP_DEGREE = "tp_degree"
PARAM_ALIGNMENT_PADDINGS = Zero.PARAM_PADDINGS

# ------------------------------------------------------------------ file names
MODEL_FILE_PREFIX = "mp_rank_"
ZERO_FILE_PREFIX = "zero_pp_rank_"
OPTIM_FILE_SUFFIX = "_optim_states.pt"
MODEL_FILE_SUFFIX = "_model_states.pt"
LAYER_FILE_PREFIX = "layer_"
BF16_ZERO_FILE_PREFIX = "bf16_" + ZERO_FILE_PREFIX
FP16_ZERO_FILE_PREFIX = "fp16_" + ZERO_FILE_PREFIX

# ------------------------------------------------------------------ universal checkpoints
UNIVERSAL_CHECKPOINT_INFO = Model.UNIVERSAL_INFO
UNIVERSAL_CHECKPOINT_VERSION_KEY = "universal_checkpoint_version"
UNIVERSAL_CHECKPOINT_VERSION_VALUE = 0.4
CAT_DIM = "cat_dim"
PARAM_N_SUB_PARAMS = "param_n_sub_params"
SUB_PARAM_SHAPE = "sub_param_shape"
VOCAB_TENSOR = "vocab_tensor"
TP_REPLICATED_PARAMETER_PATTERNS = "tp_replicated_parameter_patterns"
PARAMETER_TO_AVERAGE_PATTERNS = "parameter_to_average_patterns"
PARAMETER_WITH_ROW_PARALLELISM_PATTERNS = "parameter_with_row_parallelism_patterns"
VOCABULARY_PARAMETER_PATTERNS = "vocabulary_parameter_patterns"
PIPELINE_REPLICATED_PARAMETER_PATTERNS = "pipeline_replicated_parameter_patterns"
PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0 = "parameter_with_2_sub_params_cat_dim_0"
PARAMETER_WITH_SUB_PARAMS = "parameter_with_sub_params"
SUB_PARAMS_SHAPE = "sub_params_shape"
SUB_PARAM_SHARD_WIDTHS = "sub_param_shard_widths"
AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS = "autotp_unsupported_parameter_patterns"
EXPERT_PARAMETER_PATTERNS = "expert_parameter_patterns"
DS_AUTOTP_UC_META = "ds_autotp_universal_checkpoint_meta"
ORIGINAL_VOCAB_SIZE = "original_vocab_size"
PADDED_VOCAB_SIZE = "padded_vocab_size"
FP32_WEIGHT_KEY = "fp32"

# ------------------------------------------------------------------ automatic expert parallelism
AUTOEP_LAYERS_KEY = Model.AUTOEP_LAYERS
AUTOEP_LAYERS_KEY_LEGACY = "autoep_layers"
AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY = "checkpoint_format"
AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION_KEY = "checkpoint_format_version"
AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION = 1
AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT = "zero3_partitioned"
AUTOEP_PER_EXPERT_FILES_FORMAT = "per_expert_files"
EP_IS_EXPERT_PARAM = Universal.IS_EXPERT
EP_NUM_EXPERTS = Universal.NUM_EXPERTS
FOLDING_METADATA_KEY = Model.FOLDING
FOLDING_TP_SIZE = "tp_size"
FOLDING_TP_RANK = "tp_rank"
FOLDING_EP_SIZE = "ep_size"
FOLDING_EP_RANK = "ep_rank"
FOLDING_ETP_SIZE = "etp_size"
FOLDING_ETP_RANK = "etp_rank"
FOLDING_ZERO_PARTITION_GROUP = "zero_partition_group"
FOLDING_ZERO_PARTITION_RANK = "zero_partition_rank"
FOLDING_ZERO_PARTITION_COUNT = "zero_partition_count"
FOLDING_DISPATCH_STRATEGY = "dispatch_strategy"
FOLDING_SHARED_EXPERT_PLACEMENT = "shared_expert_placement"
FOLDING_FAMILY = "family"
FOLDING_PARAM_FAMILIES = "param_families"
