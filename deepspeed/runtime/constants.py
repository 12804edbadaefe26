# SPDX-License-Identifier: Apache-2.0
"""Names that other programs import from here; the configuration's keys and defaults live in its models."""

from __future__ import annotations

ROUTE_TRAIN = "train"
ROUTE_EVAL = "eval"
ROUTE_PREDICT = "predict"
ROUTE_ENCODE = "encode"

TRAIN_BATCH_SIZE = "train_batch_size"
TRAIN_MICRO_BATCH_SIZE_PER_GPU = "train_micro_batch_size_per_gpu"
GRADIENT_ACCUMULATION_STEPS = "gradient_accumulation_steps"
GRADIENT_CLIPPING = "gradient_clipping"
GRADIENT_CLIPPING_DEFAULT = 1.0
LOG_LEVEL = "log_level"
LOG_LEVEL_DEFAULT = None
STEPS_PER_PRINT = "steps_per_print"
ZERO_OPTIMIZATION = "zero_optimization"
DATA_TYPES = "data_types"
GRAD_ACCUM_DTYPE = "grad_accum_dtype"
FP16 = "fp16"
BFLOAT16 = "bf16"
BFLOAT16_OLD = "bfloat16"
AMP = "amp"

OPTIMIZER = "optimizer"
OPTIMIZER_PARAMS = "params"
SCHEDULER = "scheduler"
SCHEDULER_PARAMS = "params"
TYPE = "type"
LEGACY_FUSION = "legacy_fusion"
MAX_GRAD_NORM = "max_grad_norm"

ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
ADAGRAD_OPTIMIZER = "adagrad"
LAMB_OPTIMIZER = "lamb"
ONEBIT_ADAM_OPTIMIZER = "onebitadam"
ONEBIT_LAMB_OPTIMIZER = "onebitlamb"
ZERO_ONE_ADAM_OPTIMIZER = "zerooneadam"
MUADAM_OPTIMIZER = "muadam"
MUADAMW_OPTIMIZER = "muadamw"
MUSGD_OPTIMIZER = "musgd"
LION_OPTIMIZER = "lion"
MUON_OPTIMIZER = "muon"
DEEPSPEED_OPTIMIZERS = [
    ADAM_OPTIMIZER,
    ADAMW_OPTIMIZER,
    ADAGRAD_OPTIMIZER,
    LAMB_OPTIMIZER,
    ONEBIT_ADAM_OPTIMIZER,
    ONEBIT_LAMB_OPTIMIZER,
    ZERO_ONE_ADAM_OPTIMIZER,
    MUADAM_OPTIMIZER,
    MUADAMW_OPTIMIZER,
    MUSGD_OPTIMIZER,
    LION_OPTIMIZER,
    MUON_OPTIMIZER,
]
"""Values of ``optimizer.type`` that we build ourselves; they are matched in any case."""

# Entries of an ``optimizer.params`` of type Adam that choose the class instead of reaching it.
TORCH_ADAM_PARAM = "torch_adam"
ADAM_W_MODE = "adam_w_mode"
ADAM_W_MODE_DEFAULT = True

PIPE_REPLICATED = "ds_pipe_replicated"
MODEL_PARALLEL = "tensor_model_parallel"
USE_DATA_BEFORE_EXPERT_PARALLEL = "use_data_before_expert_parallelism"
