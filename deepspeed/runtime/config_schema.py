# SPDX-License-Identifier: Apache-2.0
"""The whole configuration as one model: every key the dialect knows is a field here or in a section's model."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from ..autotuning.config import DeepSpeedAutotuningConfig
from ..comm.config import CommsLoggerConfig
from ..compile.config import CompileConfig
from ..compression.config import CompressionConfig
from ..elasticity.config import ElasticityConfig
from ..inference.config import WeightQuantConfig
from ..moe.config import AutoEPConfig
from ..monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from ..nebula.config import DeepSpeedNebulaConfig
from ..profiling.config import DeepSpeedFlopsProfilerConfig
from ..utils.config import DeepSpeedTimersConfig
from ..utils.errors import explain
from .activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from .config_errors import ConfigTypeError, ConfigValueError
from .config_sections import (
    AmpSection,
    DataTypesSection,
    HybridEngineConfig,
    OptimizerSection,
    PipelineSection,
    QuantizeTrainingSection,
    SchedulerSection,
)
from .config_utils import (
    DeepSpeedConfigModel,
    DtypeEnum,
    PlainSection,
    is_auto,
    pp_int,
)
from .constants import GRADIENT_CLIPPING_DEFAULT, LOG_LEVEL_DEFAULT
from .data_pipeline.config import (
    DataEfficiencyConfig,
    LegacyCurriculumConfig,
    ProgressiveLayerDropConfig,
)
from .model_checkpointing.config import CheckpointConfig
from .precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config, TorchAutocastConfig
from .swap_tensor.aio_config import AioConfig
from .tensor_parallel.config import TPTrainingConfig
from .zero.config import DeepSpeedZeroConfig

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

# What an integration would put in place of "auto", and which integration usually does.
_FILLED_BY = "transformers' Trainer or accelerate fill it in before deepspeed sees it"


class TopLevel(PlainSection):
    """The keys at the top of a configuration. Parsed sections are made first, each on its own."""

    model_config = ConfigDict(title="DeepSpeedConfig")

    # ------------------------------------------------------------------ batch sizes
    train_batch_size: int | None = Field(
        default=None, description="Samples of one optimizer step on all ranks."
    )
    train_micro_batch_size_per_gpu: int | None = Field(
        default=None, description="Samples of one forward pass on one rank."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None, description="Forward passes to one optimizer step."
    )
    managed_gradient_accumulation: bool = Field(
        default=True, description="Count micro steps; false: each call of step() is a boundary."
    )
    # ------------------------------------------------------------------ reporting
    steps_per_print: int | float | None = Field(
        default=None, description="Optimizer steps between progress lines; null prints none."
    )
    dump_state: bool = Field(
        default=False, description="Print the engine's attributes at the start."
    )
    wall_clock_breakdown: bool = Field(default=False, description="Time the parts of a step.")
    memory_breakdown: bool = Field(default=False, description="Print memory use at several places.")
    log_level: str | None = Field(
        default=LOG_LEVEL_DEFAULT, description=f"Logger level: {', '.join(LOG_LEVELS)}."
    )
    vocabulary_size: int | None = Field(default=None, description="Warn if not a multiple of 8.")
    # ------------------------------------------------------------------ gradients
    communication_data_type: Any = Field(
        default=None, description="Dtype in which gradients are reduced: fp32, fp16 or bf16."
    )
    seq_parallel_communication_data_type: Any = Field(
        default=torch.float32, description="The same where the sequence is split over ranks."
    )
    prescale_gradients: bool = Field(
        default=False, description="Divide by the ranks before reducing."
    )
    gradient_predivide_factor: float = Field(
        default=1.0, description="Divide by this before reducing and by the rest afterwards."
    )
    gradient_allreduce_op: str = Field(default="mean", description="mean or sum over the ranks.")
    sparse_gradients: bool = Field(
        default=False, description="Reduce embedding gradients as sparse."
    )
    gradient_clipping: float = Field(
        default=GRADIENT_CLIPPING_DEFAULT, description="Bound of the global 2-norm; 0 is off."
    )
    disable_allgather: bool = Field(default=False, description="Parsed and unused.")
    graph_harvesting: bool = Field(
        default=False, description="Capture norm and clip in a CUDA graph."
    )
    # ------------------------------------------------------------------ optimizer
    optimizer: OptimizerSection = Field(
        default_factory=OptimizerSection, description="The optimizer to build."
    )
    scheduler: SchedulerSection = Field(
        default_factory=SchedulerSection, description="The learning-rate scheduler to build."
    )
    zero_allow_untested_optimizer: bool = Field(
        default=False, description="Accept optimizers that ZeRO was not tested with."
    )
    zero_force_ds_cpu_optimizer: bool = Field(
        default=True, description="With optimizer offload, insist on our own CPU optimizers."
    )
    # ------------------------------------------------------------------ ZeRO and precision
    zero_optimization: DeepSpeedZeroConfig = Field(
        default_factory=DeepSpeedZeroConfig, description="Sharding and offload; a bool is legacy."
    )
    allgather_size: int = Field(
        default=pp_int(5e8), description="Legacy: with zero_optimization: true."
    )
    fp16: DeepSpeedFP16Config = Field(
        default_factory=DeepSpeedFP16Config, description="float16 training."
    )
    bf16: DeepSpeedBF16Config = Field(
        default_factory=DeepSpeedBF16Config, description="bfloat16 training."
    )
    bfloat16: DeepSpeedBF16Config = Field(
        default_factory=DeepSpeedBF16Config, description="Old spelling of bf16."
    )
    amp: AmpSection = Field(
        default_factory=AmpSection,
        description="NVIDIA Apex; further keys are the arguments of amp.initialize.",
    )
    torch_autocast: TorchAutocastConfig = Field(
        default_factory=TorchAutocastConfig, description="torch.autocast in the forward pass."
    )
    data_types: DataTypesSection = Field(
        default_factory=DataTypesSection, description="Dtypes that differ from the mode's."
    )
    # ------------------------------------------------------------------ data and parallelism
    dataloader_drop_last: bool = Field(default=False, description="Drop an incomplete last batch.")
    use_data_before_expert_parallelism: bool = Field(
        default=False, description="Order of data- and expert-parallel ranks."
    )
    sequence_parallel_size: int | None = Field(
        default=None, description="Ranks that share a sequence."
    )
    data_parallel_size: int | None = Field(
        default=None, description="Ranks with different samples."
    )
    disable_python_gc: bool = Field(
        default=False, description="Collect garbage only between steps."
    )
    pipeline: PipelineSection = Field(
        default_factory=PipelineSection, description="The pipeline engine's settings."
    )
    tensor_parallel: TPTrainingConfig = Field(
        default_factory=TPTrainingConfig, description="Layers split over ranks (AutoTP)."
    )
    expert_parallel: AutoEPConfig = Field(
        default_factory=AutoEPConfig, description="Experts spread over ranks (AutoEP)."
    )
    hybrid_engine: HybridEngineConfig = Field(
        default_factory=HybridEngineConfig, description="Train and generate in turn."
    )
    compile: CompileConfig = Field(default_factory=CompileConfig, description="DeepCompile.")
    activation_checkpointing: DeepSpeedActivationCheckpointingConfig = Field(
        default_factory=DeepSpeedActivationCheckpointingConfig, description="Recomputation."
    )
    # ------------------------------------------------------------------ files and monitors
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="How checkpoints are written and read."
    )
    nebula: DeepSpeedNebulaConfig = Field(
        default_factory=DeepSpeedNebulaConfig, description="Azure's checkpoint service."
    )
    datastates_ckpt: Any = Field(default=None, description="Settings of the DataStates engine.")
    aio: AioConfig = Field(default_factory=AioConfig, description="Asynchronous file access.")
    comms_logger: CommsLoggerConfig = Field(
        default_factory=CommsLoggerConfig, description="Record collectives."
    )
    flops_profiler: DeepSpeedFlopsProfilerConfig = Field(
        default_factory=DeepSpeedFlopsProfilerConfig, description="Count operations of a step."
    )
    tensorboard: TensorBoardConfig = Field(
        default_factory=TensorBoardConfig, description="TensorBoard event files."
    )
    csv_monitor: CSVConfig = Field(default_factory=CSVConfig, description="CSV files.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")
    comet: CometConfig = Field(default_factory=CometConfig, description="Comet experiments.")
    timers: DeepSpeedTimersConfig = Field(
        default_factory=DeepSpeedTimersConfig, description="Timers."
    )
    # ------------------------------------------------------------------ techniques
    data_efficiency: DataEfficiencyConfig = Field(
        default_factory=DataEfficiencyConfig, description="Data sampling and routing."
    )
    curriculum_learning: LegacyCurriculumConfig = Field(
        default_factory=LegacyCurriculumConfig, description="Legacy curriculum."
    )
    progressive_layer_drop: ProgressiveLayerDropConfig = Field(
        default_factory=ProgressiveLayerDropConfig, description="Skip layers more and more."
    )
    compression_training: dict[str, Any] | None = Field(
        default=None, description="Quantisation and pruning during training."
    )
    quantize_training: QuantizeTrainingSection = Field(
        default_factory=QuantizeTrainingSection, description="Curvature for quantisation."
    )
    weight_quantization: WeightQuantConfig | None = Field(
        default=None, description="Weights kept quantised (ZeRO inference)."
    )
    sparse_attention: dict[str, Any] | None = Field(
        default=None, description="Legacy: parsed, unused."
    )
    elasticity: dict[str, Any] | None = Field(
        default=None, description="A batch size that fits many numbers of devices."
    )
    autotuning: DeepSpeedAutotuningConfig = Field(
        default_factory=DeepSpeedAutotuningConfig, description="Search for a fast configuration."
    )

    def __init__(self, /, **data: Any) -> None:
        """Build from a whole configuration, in which null means absent.

        Sections are built one by one before the scalars, so that their errors keep their own types.
        """
        given = {key: value for key, value in data.items() if value is not None}
        given |= {key: whole_number(given[key], key) for key in BATCH_KEYS if key in given}
        for name, field in type(self).model_fields.items():
            section = section_type(field)
            if section is not None and name in given and not isinstance(given[name], section):
                given[name] = section(**_mapping(name, given[name]))
        super().__init__(**given)

    @field_validator(
        "communication_data_type", "seq_parallel_communication_data_type", mode="before"
    )
    @classmethod
    def _reduction_dtype(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or isinstance(value, torch.dtype):
            return value
        names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        found = names.get(value.lower()) if isinstance(value, str) else None
        if found is None:
            what = f"Invalid {info.field_name}"
            raise ValueError(explain(what, got=repr(value), expected=", ".join(names)))
        return found

    @field_validator("gradient_allreduce_op", mode="before")
    @classmethod
    def _mean_or_sum(cls, value: Any) -> Any:
        op = value.lower() if isinstance(value, str) else value
        if op not in ("mean", "sum"):
            raise ValueError(
                explain("Invalid gradient_allreduce_op", got=repr(value), expected="mean or sum")
            )
        return op


def section_type(field: FieldInfo) -> type[DeepSpeedConfigModel] | None:
    """Return the model of a field that is a section, or None for a scalar field."""
    options = typing.get_args(field.annotation) if _is_union(field.annotation) else ()
    for option in options or (field.annotation,):
        if isinstance(option, type) and issubclass(option, DeepSpeedConfigModel):
            return option
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, UnionType)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if not isinstance(value, Mapping):
        raise ConfigTypeError(
            explain(
                f"config section '{name}' has the wrong type",
                got=f"{value!r} ({type(value).__name__})",
                expected="a JSON object",
            )
        )
    return value


def whole_number(value: Any, key: str) -> int:
    """Return one of the batch-size keys as an int.

    Raises:
        TypeError: (as ``ConfigTypeError``) not a whole number, or an ``"auto"`` that nobody filled in.
        ValueError: (as ``ConfigValueError``) a number with a fraction.
    """
    if is_auto(value):
        raise ConfigTypeError(
            explain(
                f"'{key}' is \"auto\" and nobody filled it in",
                expected="a whole number above 0",
                fix=f"Write the number, or leave the key to a program that knows it: {_FILLED_BY}.",
            )
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = f"{value!r} ({type(value).__name__})"
        raise ConfigTypeError(
            explain(f"'{key}' has the wrong type", got=shown, expected="a whole number above 0")
        )
    if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
        raise ConfigValueError(
            explain(f"'{key}' is not whole", got=value, expected="a whole number above 0")
        )
    return int(value)


@dataclass(frozen=True)
class KeyInfo:
    """One key of the dialect, as its field declares it."""

    path: str
    """Dotted path from the top of the configuration."""
    type: str
    """Accepted type, as Python writes it."""
    default: object
    """Value when absent."""
    description: str
    """What the key does."""
    alias: str | None
    """A second accepted spelling, if there is one."""
    deprecated: bool
    """Whether using it logs a warning."""


# Sections that are read only when something asks for them, so their field here is a plain dictionary.
_READ_ELSEWHERE: dict[str, type[DeepSpeedConfigModel]] = {
    "elasticity": ElasticityConfig,
    "compression_training": CompressionConfig,
}


def describe(model: type[BaseModel] = TopLevel, prefix: str = "") -> Iterator[KeyInfo]:
    """Yield every key of the configuration, in order, sections before their own keys.

    Example:
        >>> next(describe()).path
        'train_batch_size'
    """
    for name, field in model.model_fields.items():
        section = section_type(field)
        extra = field.json_schema_extra
        yield KeyInfo(
            path=f"{prefix}{name}",
            type=_type_name(field.annotation),
            default=None if section else field.get_default(call_default_factory=True),
            description=field.description or "",
            alias=field.alias if field.alias != name else None,
            deprecated=isinstance(extra, dict) and bool(extra.get("deprecated")),
        )
        section = section or _READ_ELSEWHERE.get(f"{prefix}{name}")
        if section is not None:
            yield from describe(section, f"{prefix}{name}.")


def _type_name(annotation: Any) -> str:
    if _is_union(annotation):
        return " | ".join(_type_name(option) for option in typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation)).replace("typing.", "")


__all__ = [
    "BATCH_KEYS",
    "DtypeEnum",
    "KeyInfo",
    "TopLevel",
    "describe",
    "section_type",
    "whole_number",
]
