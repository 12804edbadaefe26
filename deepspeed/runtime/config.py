# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run: read once, checked, and kept under the attribute names that programs know."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..comm.config import DeepSpeedCommsConfig
from ..compression.config import get_compression_config
from ..elasticity.config import ElasticityConfigError
from ..elasticity.elasticity import (
    compute_elastic_config,
    elasticity_enabled,
    ensure_immutable_elastic_config,
)
from ..monitor.config import DeepSpeedMonitorConfig
from ..utils.errors import DeepSpeedConfigError, explain
from ..utils.logging import logger
from .config_batch import complete_batch, data_parallel_size, distributed_rank_and_size
from .config_errors import ConfigAssertionError, ConfigTypeError, ConfigValueError
from .config_schema import BATCH_KEYS, KeyInfo, TopLevel, describe
from .config_sections import (
    HybridEngineConfig,
    get_amp_params,
    get_datastates_config,
    get_sparse_attention,
)
from .config_utils import (
    DeepSpeedConfigModel,
    DtypeEnum,
    ScientificNotationEncoder,
    dict_raise_error_on_duplicate_keys,
    section_of,
)
from .constants import (
    ADAGRAD_OPTIMIZER,
    ADAM_OPTIMIZER,
    ADAM_W_MODE,
    ADAM_W_MODE_DEFAULT,
    ADAMW_OPTIMIZER,
    DEEPSPEED_OPTIMIZERS,
    GRADIENT_CLIPPING,
    GRADIENT_CLIPPING_DEFAULT,
    LAMB_OPTIMIZER,
    LION_OPTIMIZER,
    LOG_LEVEL,
    LOG_LEVEL_DEFAULT,
    MAX_GRAD_NORM,
    MUADAM_OPTIMIZER,
    MUADAMW_OPTIMIZER,
    MUON_OPTIMIZER,
    MUSGD_OPTIMIZER,
    ONEBIT_ADAM_OPTIMIZER,
    ONEBIT_LAMB_OPTIMIZER,
    TORCH_ADAM_PARAM,
    ZERO_ONE_ADAM_OPTIMIZER,
)
from .data_pipeline.config import get_curriculum_params_legacy, get_data_efficiency_config
from .torch_autocast import get_default_autocast_lower_precision_modules
from .zero.config import read_zero_config


def load_config(config: Any) -> dict[str, Any]:
    """Return a configuration as a dictionary.

    Args:
        config: a dictionary (returned as it is), the path of a JSON or Hjson file, or url-safe base64 of
            such a text.

    Raises:
        ValueError: (as ``ConfigValueError``) duplicate keys, a text that is neither a file nor base64 of a
            JSON object, or a file that does not parse.
        TypeError: (as ``ConfigTypeError``) some other type.
    """
    if isinstance(config, dict):
        return config
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigTypeError(
            explain(
                "a configuration is a dictionary, a path to a JSON file or base64 of such a text",
                got=f"{config!r} ({type(config).__name__})",
            )
        )
    path = Path(config)
    if _is_file(path):
        return _parse_text(_read_text(path), f"config file {path}")
    text = os.fspath(config)
    cause: Exception | None
    try:
        decoded = base64.b64decode(text.strip(), altchars=b"-_", validate=True).decode("utf-8")
        if decoded.strip():
            return _parse_text(decoded, "base64 config")
        cause = None
    except (binascii.Error, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        if isinstance(error, ConfigValueError) and "Duplicate" in str(error):
            raise
        cause = error
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    raise ConfigValueError(
        explain(
            "no configuration found",
            got=repr(shown),
            expected="the path of an existing JSON file, a dict, or base64 of a JSON text",
            fix=f"Check the path; the current folder is {Path.cwd()}.",
        )
    ) from cause


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a long base64 text is no legal file name
        return False


def _read_text(path: Path) -> str:
    try:
        return path.read_text(
            encoding="utf-8-sig"
        )  # editors on Windows put a byte-order mark first
    except UnicodeDecodeError as error:
        what = f"config file {path} is not UTF-8 text"
        raise ConfigValueError(explain(what, got=str(error), fix="Save it as UTF-8.")) from error


def _parse_text(text: str, source: str) -> dict[str, Any]:
    """Parse Hjson, of which JSON is a part; ``source`` is said in errors."""
    import hjson  # imported here: a dictionary needs no parser

    try:
        parsed = hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except hjson.HjsonDecodeError as error:
        raise ConfigValueError(explain(f"{source} is not valid JSON", got=str(error))) from error
    if not isinstance(parsed, dict):
        raise ConfigValueError(
            explain(f"{source} holds no JSON object", got=type(parsed).__name__, expected="{...}")
        )
    return parsed


def get_gradient_clipping(param_dict: Mapping[str, Any]) -> float:
    """The bound of the global norm that a whole configuration asks for."""
    return param_dict.get(GRADIENT_CLIPPING, GRADIENT_CLIPPING_DEFAULT)


def get_log_level(param_dict: Mapping[str, Any]) -> str | None:
    """The logger's level that a whole configuration asks for; None leaves it as it is."""
    return param_dict.get(LOG_LEVEL, LOG_LEVEL_DEFAULT)


class DeepSpeedConfig:
    """A parsed configuration.

    Args:
        config: dictionary, path to a JSON or Hjson file, or url-safe base64 of such a text.
        mpu: object that knows the model-parallel groups; it decides the number of data-parallel ranks.
        mesh_device: device mesh with a dimension ``data_parallel``, used when there is no mpu.

    Raises:
        pydantic.ValidationError: an unknown key or a wrong value inside a section.
        AssertionError: an impossible batch triad, fp16 together with bf16, and the like.
        ValueError: an unreadable text, or a value that is none of the accepted words.
        TypeError: a value or section of the wrong type, or an unfilled ``"auto"`` batch size.
        DeepSpeedConfigError: base of the last three.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        self._param_dict: dict[str, Any] = load_config(config)
        raw = {key: value for key, value in self._param_dict.items() if isinstance(key, str)}
        sp_size = raw.get("sequence_parallel_size")
        self.global_rank, self.world_size = data_parallel_size(sp_size, mpu, mesh_device)
        self._apply_elasticity(raw)
        if raw.get("zero_optimization") is not None:
            sharding = read_zero_config(raw["zero_optimization"], raw.get("allgather_size"))
            raw["zero_optimization"] = sharding
        keys = TopLevel(**raw)
        self._set_batch(keys)
        self._set_reporting(keys)
        self._set_gradients(keys)
        self._set_precision(keys, raw)
        self._set_parallelism(keys, raw)
        self._set_files(keys, raw)
        self._set_techniques(keys, raw)
        self._check()

    # ------------------------------------------------------------------ attributes, by theme
    def _apply_elasticity(self, raw: dict[str, Any]) -> None:
        """Let an enabled ``elasticity`` section decide the three batch sizes."""
        self.elasticity_enabled: bool = elasticity_enabled(raw)
        self.elastic_model_parallel_size = 1
        self.num_gpus_per_node = 1
        if not self.elasticity_enabled:
            return
        section = section_of(raw, "elasticity")
        given = [key for key in BATCH_KEYS if raw.get(key) is not None]
        if given and not section.get("ignore_non_elastic_batch_info", False):
            raise ElasticityConfigError(
                explain(
                    "elasticity decides the batch sizes, and the config gives them too",
                    got=", ".join(given),
                    fix="Remove them, or set 'elasticity.ignore_non_elastic_batch_info'.",
                )
            )
        ensure_immutable_elastic_config(section)
        self.elastic_model_parallel_size = section.get("model_parallel_size", 1)
        self.num_gpus_per_node = section.get("num_gpus_per_node", 1)
        devices = max(self.world_size, distributed_rank_and_size()[1])
        train, _, micro = compute_elastic_config(raw, world_size=devices)  # type: ignore[misc]
        if micro is None:
            raise ElasticityConfigError(
                explain("no elastic micro-batch size fits", got=f"{self.world_size} ranks")
            )
        raw["train_batch_size"] = train
        raw["train_micro_batch_size_per_gpu"] = micro
        raw["gradient_accumulation_steps"] = train // (micro * self.world_size)

    def _set_batch(self, keys: TopLevel) -> None:
        self.train_batch_size: Any
        self.train_micro_batch_size_per_gpu: Any
        self.gradient_accumulation_steps: Any
        for key in BATCH_KEYS:
            setattr(self, key, getattr(keys, key))
        if not self._counts_tensor_ranks(keys.tensor_parallel.autotp_size):
            self._configure_train_batch_size()
        self.managed_gradient_accumulation = keys.managed_gradient_accumulation
        self.dataloader_drop_last = keys.dataloader_drop_last

    def _counts_tensor_ranks(self, tensor: int) -> bool:
        """Whether all three sizes are given, and train_batch_size is a product with every rank.

        Trainers that know of no tensor parallelism fill in such sizes; micro batch and steps say all.
        """
        train, micro, steps = (getattr(self, key) for key in BATCH_KEYS)
        if tensor < 2 or None in (train, micro, steps) or min(train, micro, steps) < 1:
            return False
        everyone = distributed_rank_and_size()[1]
        return self.world_size * tensor == everyone and train == micro * steps * everyone

    def _configure_train_batch_size(self) -> None:
        """Derive those of the three batch sizes that are None, and check them all."""
        given = (getattr(self, key) for key in BATCH_KEYS)
        for key, value in zip(BATCH_KEYS, complete_batch(*given, self.world_size), strict=True):
            setattr(self, key, value)

    def _set_reporting(self, keys: TopLevel) -> None:
        self.steps_per_print = keys.steps_per_print
        self.dump_state = keys.dump_state
        self.disable_python_gc = keys.disable_python_gc
        self.flops_profiler_config = keys.flops_profiler
        self.wall_clock_breakdown = keys.wall_clock_breakdown or keys.flops_profiler.enabled
        self.memory_breakdown = keys.memory_breakdown
        self.log_level = keys.log_level
        self.vocabulary_size = keys.vocabulary_size
        self.comms_config = DeepSpeedCommsConfig({"comms_logger": keys.comms_logger.model_dump()})
        self.comms_config.comms_logger_enabled = "comms_logger" in self._param_dict
        self.monitor_config = DeepSpeedMonitorConfig(
            tensorboard=keys.tensorboard,
            comet=keys.comet,
            wandb=keys.wandb,
            csv_monitor=keys.csv_monitor,
        )
        self.timers_config = keys.timers.throughput
        self.autotuning_config = keys.autotuning

    def _set_gradients(self, keys: TopLevel) -> None:
        self.disable_allgather = keys.disable_allgather
        self.communication_data_type: torch.dtype | None = keys.communication_data_type
        self.seq_parallel_communication_data_type: torch.dtype = (
            keys.seq_parallel_communication_data_type
        )
        self.prescale_gradients = keys.prescale_gradients
        self.gradient_predivide_factor = keys.gradient_predivide_factor
        self.gradient_allreduce_op = keys.gradient_allreduce_op
        self.sparse_gradients_enabled = keys.sparse_gradients
        self.gradient_clipping = keys.gradient_clipping
        self.graph_harvesting = keys.graph_harvesting
        self.optimizer_name = keys.optimizer.name
        self.optimizer_params = keys.optimizer.params
        self.optimizer_legacy_fusion = keys.optimizer.legacy_fusion
        self.zero_allow_untested_optimizer = keys.zero_allow_untested_optimizer
        self.zero_force_ds_cpu_optimizer = keys.zero_force_ds_cpu_optimizer
        self.scheduler_name = keys.scheduler.type
        self.scheduler_params = keys.scheduler.params

    def _set_precision(self, keys: TopLevel, raw: dict[str, Any]) -> None:
        self.float16_config = keys.fp16
        self.bfloat16_config = keys.bf16 if raw.get("bf16") is not None else keys.bfloat16
        # Names of old, which BERT programs read to build their transformer layers.
        self.fp16_enabled = self.float16_config.enabled
        self.bfloat16_enabled = self.bfloat16_config.enabled
        self.amp_enabled = keys.amp.enabled
        self.amp_params = get_amp_params(raw)
        self.torch_autocast_enabled = keys.torch_autocast.enabled
        self.torch_autocast_dtype: torch.dtype | None = keys.torch_autocast.dtype
        safe = keys.torch_autocast.lower_precision_safe_modules
        self.torch_autocast_lower_precision_safe_modules: list[str] = (
            get_default_autocast_lower_precision_modules() if safe is None else safe
        )
        self.grad_accum_dtype: torch.dtype | None = keys.data_types.grad_accum_dtype
        self.param_dtype: torch.dtype | None = keys.data_types.param_dtype
        self.buffer_dtype: torch.dtype | None = keys.data_types.buffer_dtype
        self.keep_in_fp32_modules = keys.data_types.keep_in_fp32_modules

    def _set_parallelism(self, keys: TopLevel, raw: dict[str, Any]) -> None:
        self.zero_config = keys.zero_optimization
        self.zero_optimization_stage = int(self.zero_config.stage)
        self.zero_enabled = self.zero_optimization_stage > 0
        self.mics_shard_size = self.zero_config.mics_shard_size
        self.mics_hierarchial_params_gather = self.zero_config.mics_hierarchical_params_gather
        self.use_data_before_expert_parallel_ = keys.use_data_before_expert_parallelism
        self.sequence_parallel_size = keys.sequence_parallel_size
        self.data_parallel_size = keys.data_parallel_size
        self.hybrid_engine: HybridEngineConfig = keys.hybrid_engine
        self.pipeline = keys.pipeline.model_dump()
        if self.pipeline["use_reentrant"] is None:
            self.pipeline["use_reentrant"] = True
        self.tensor_parallel_config = keys.tensor_parallel
        self.expert_parallel_config = keys.expert_parallel
        self.compile_config = keys.compile
        self.activation_checkpointing_config = keys.activation_checkpointing
        self.sparse_attention = get_sparse_attention(raw)

    def _set_files(self, keys: TopLevel, raw: dict[str, Any]) -> None:
        checkpoint = keys.checkpoint
        self.checkpoint_config = checkpoint.model_dump(
            include={"tag_validation", "checkpoint_serialization", "writer"}
        )
        self.checkpoint_tag_validation_enabled = checkpoint.tag_validation != "IGNORE"
        self.checkpoint_tag_validation_fail = checkpoint.tag_validation == "FAIL"
        self.load_universal_checkpoint = checkpoint.load_universal
        self.use_node_local_storage = checkpoint.use_node_local_storage
        self.checkpoint_parallel_write_pipeline = checkpoint.parallel_write.pipeline_stage
        self.nebula_config = keys.nebula
        self.datastates_config = get_datastates_config(raw)
        self.aio_config = keys.aio.model_dump()

    def _set_techniques(self, keys: TopLevel, raw: dict[str, Any]) -> None:
        self.compression_config = get_compression_config(raw)
        self.weight_quantization_config = keys.weight_quantization
        eigenvalue = keys.quantize_training.eigenvalue
        self.eigenvalue_enabled = eigenvalue.enabled
        self.eigenvalue_verbose = eigenvalue.verbose
        self.eigenvalue_max_iter = eigenvalue.max_iter
        self.eigenvalue_tol = eigenvalue.tol
        self.eigenvalue_stability = eigenvalue.stability
        self.eigenvalue_gas_boundary_resolution = eigenvalue.gas_boundary_resolution
        self.eigenvalue_layer_name = eigenvalue.layer_name
        self.eigenvalue_layer_num = eigenvalue.layer_num
        self.pld_enabled = keys.progressive_layer_drop.enabled
        pld = keys.progressive_layer_drop.model_dump(exclude={"enabled"})
        self.pld_params = pld if self.pld_enabled else False
        self.curriculum_enabled_legacy = keys.curriculum_learning.enabled
        self.curriculum_params_legacy = get_curriculum_params_legacy(raw)
        self.data_efficiency_config = get_data_efficiency_config(raw)
        self.data_efficiency_enabled: bool = self.data_efficiency_config["enabled"]

    # ------------------------------------------------------------------ checks across sections
    def _check(self) -> None:
        fp16, bf16, zero = self.float16_config, self.bfloat16_config, self.zero_enabled
        if fp16.enabled and bf16.enabled:
            raise ConfigAssertionError(
                "bfloat16 and fp16 modes cannot be simultaneously enabled: disable one of them."
            )
        needs_zero = {
            "fp16_master_weights_and_grads": fp16.fp16_master_weights_and_grads,
            "bf16_master_weights_and_grads": bf16.bf16_master_weights_and_grads,
            "bf16_optimizer_states": bf16.bf16_optimizer_states,
        }
        for key, wanted in needs_zero.items():
            if wanted and not zero:
                raise ConfigAssertionError(
                    f"{key} is only supported with ZeRO stage 1, 2 or 3: set "
                    f"'zero_optimization.stage', or '{key}' to false."
                )
        if bf16.bf16_optimizer_states and not bf16.bf16_master_weights_and_grads:
            raise ConfigAssertionError(
                "bf16_optimizer_states needs bf16_master_weights_and_grads: set both, or neither."
            )
        self._check_sum_and_dtypes()
        self._warn()

    def _check_sum_and_dtypes(self) -> None:
        if self.gradient_allreduce_op == "sum":
            for name, there in (
                ("ZeRO stage 3", self.zero_optimization_stage == 3),
                ("ZenFlow", self.zero_config.zenflow is not None),
                ("DeepCompile", self.compile_config.deepcompile),
            ):
                if there:
                    raise ConfigValueError(
                        f"gradient_allreduce_op='sum' is not supported with {name}: use 'mean'."
                    )
        if self.param_dtype is None:
            return
        for mode, dtype in (
            (self.float16_config, torch.float16),
            (self.bfloat16_config, torch.bfloat16),
        ):
            if mode.enabled and self.param_dtype != dtype:
                raise ConfigAssertionError(
                    explain(
                        "data_types.param_dtype contradicts the enabled precision",
                        got=str(self.param_dtype),
                        expected=str(dtype),
                        fix="Remove it, or enable the other precision.",
                    )
                )

    def _warn(self) -> None:
        if self.vocabulary_size and self.vocabulary_size % 8 != 0:
            logger.warning(
                f"vocabulary_size {self.vocabulary_size} is not a multiple of 8, which tensor "
                "cores need to be fast."
            )
        if (self.optimizer_params or {}).get(MAX_GRAD_NORM, 0) > 0:
            logger.warning(
                "optimizer.params.max_grad_norm is not an argument of our optimizers; set "
                "'gradient_clipping' instead."
            )

    # ------------------------------------------------------------------ showing
    def print_user_config(self) -> None:
        """Log (INFO) the configuration as it was given."""
        text = json.dumps(self._param_dict, sort_keys=True, indent=4, cls=ScientificNotationEncoder)
        logger.info(f"  json = {text}")

    def print(self, name: str) -> None:
        """Log (INFO) every attribute under the heading ``name``, then the configuration as given."""
        logger.info(f"{name}:")
        for attribute in sorted(vars(self)):
            if attribute != "_param_dict":
                dots = "." * (29 - len(attribute))
                logger.info(f"  {attribute} {dots} {getattr(self, attribute)}")
        self.print_user_config()


__all__ = [
    "BATCH_KEYS",
    "ADAGRAD_OPTIMIZER",
    "ADAMW_OPTIMIZER",
    "ADAM_OPTIMIZER",
    "ADAM_W_MODE",
    "ADAM_W_MODE_DEFAULT",
    "DEEPSPEED_OPTIMIZERS",
    "LAMB_OPTIMIZER",
    "LION_OPTIMIZER",
    "MUADAMW_OPTIMIZER",
    "MUADAM_OPTIMIZER",
    "MUON_OPTIMIZER",
    "MUSGD_OPTIMIZER",
    "ONEBIT_ADAM_OPTIMIZER",
    "ONEBIT_LAMB_OPTIMIZER",
    "TORCH_ADAM_PARAM",
    "ZERO_ONE_ADAM_OPTIMIZER",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedConfigModel",
    "DtypeEnum",
    "HybridEngineConfig",
    "KeyInfo",
    "describe",
    "get_gradient_clipping",
    "get_log_level",
    "load_config",
]
