# SPDX-License-Identifier: Apache-2.0
"""The section ``compression_training``: quantisation, pruning and layer reduction during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..runtime.config_errors import ConfigAssertionError
from ..runtime.config_utils import OpenSection, PlainSection, section_of

COMPRESSION_TRAINING = "compression_training"


class MixedQuantizeConfig(PlainSection):
    """``fp16_mixed_quantize``: fade from fp16 to quantised weights."""

    enabled: bool = Field(default=False, description="Mix fp16 and quantised weights.")
    quantize_change_ratio: float = Field(default=0.001, description="Change of the mixture a step.")


class WeightQuantizationShared(OpenSection):
    """``weight_quantization.shared_parameters``."""

    enabled: bool = Field(default=False, description="Quantise weights.")
    quantizer_kernel: bool = Field(default=False, description="Use the native quantiser.")
    schedule_offset: int = Field(default=0, description="First step of the technique.")
    quantize_groups: int = Field(default=1, description="Groups with their own scale.")
    quantize_verbose: bool = Field(default=False, description="Log changes.")
    quantization_type: str = Field(default="symmetric", description="symmetric or asymmetric.")
    quantize_weight_in_forward: bool = Field(default=False, description="Quantise in forward.")
    rounding: str = Field(default="nearest", description="nearest or stochastic.")
    fp16_mixed_quantize: MixedQuantizeConfig = Field(
        default_factory=MixedQuantizeConfig, description="Fade from fp16 to quantised weights."
    )


class ActivationQuantizationShared(OpenSection):
    """``activation_quantization.shared_parameters``."""

    enabled: bool = Field(default=False, description="Quantise activations.")
    quantization_type: str = Field(default="symmetric", description="symmetric or asymmetric.")
    range_calibration: str = Field(default="dynamic", description="dynamic or static.")
    schedule_offset: int = Field(default=1000, description="First step of the technique.")


class SparsePruningShared(OpenSection):
    """``sparse_pruning.shared_parameters``."""

    enabled: bool = Field(default=False, description="Prune single weights.")
    method: str = Field(default="l1", description="l1, topk or snip_momentum.")
    schedule_offset: int = Field(default=1000, description="First step of the technique.")
    schedule_offset_end: int | None = Field(default=None, description="Last step (snip_momentum).")
    schedule_offset_stride: int = Field(
        default=1, description="Steps between prunings (snip_momentum)."
    )
    block_pattern: str = Field(default="4x1", description="Shape of a block (snip_momentum).")
    dense_ratio: float = Field(default=0.1, gt=0, lt=1, description="Share kept (snip_momentum).")
    excluded_modules: list[str] = Field(
        default_factory=list, description="Modules left alone (snip_momentum)."
    )


class RowPruningShared(OpenSection):
    """``row_pruning.shared_parameters``."""

    enabled: bool = Field(default=False, description="Prune rows of weights.")
    method: str = Field(default="l1", description="l1 or topk.")
    schedule_offset: int = Field(default=1000, description="First step of the technique.")


class HeadPruningShared(OpenSection):
    """``head_pruning.shared_parameters``."""

    enabled: bool = Field(default=False, description="Prune attention heads.")
    method: str = Field(default="topk", description="topk or l1.")
    schedule_offset: int = Field(default=1000, description="First step of the technique.")
    num_heads: int | None = Field(
        default=None, description="Heads of the model; required when enabled."
    )


class ChannelPruningShared(OpenSection):
    """``channel_pruning.shared_parameters``."""

    enabled: bool = Field(default=False, description="Prune channels.")
    method: str = Field(default="l1", description="l1 or topk.")
    schedule_offset: int = Field(default=1000, description="First step of the technique.")


class GroupConfig(PlainSection):
    """One entry of ``different_groups``."""

    params: dict[str, Any] = Field(default_factory=dict, description="The group's own settings.")
    modules: list[str] = Field(default_factory=lambda: ["*"], description="Patterns of modules.")
    related_modules: list[list[str]] | None = Field(
        default=None, description="Modules that lose the same rows, by entry of modules."
    )


class LayerReductionConfig(OpenSection):
    """``layer_reduction``: a student made of some of the teacher's layers."""

    enabled: bool = Field(default=False, description="Start from a student with fewer layers.")
    keep_number_layer: int | None = Field(default=None, description="Layers of the student.")
    module_name_prefix: str = Field(default="", description="Where the layers are in the model.")
    teacher_layer: list[int] = Field(
        default_factory=list, description="The teacher's layers that the student takes."
    )
    other_module_name: list[str] = Field(
        default_factory=list, description="Other modules that the student takes."
    )


class WeightQuantization(PlainSection):
    """``weight_quantization``."""

    shared_parameters: WeightQuantizationShared = Field(
        default_factory=WeightQuantizationShared, description="Settings of all groups."
    )
    different_groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Groups; params: start_bits, target_bits, ..."
    )


class ActivationQuantization(PlainSection):
    """``activation_quantization``."""

    shared_parameters: ActivationQuantizationShared = Field(
        default_factory=ActivationQuantizationShared, description="Settings of all groups."
    )
    different_groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Groups by name; params: bits."
    )


class SparsePruning(PlainSection):
    """``sparse_pruning``."""

    shared_parameters: SparsePruningShared = Field(
        default_factory=SparsePruningShared, description="Settings of all groups."
    )
    different_groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Groups by name; params: dense_ratio."
    )


class RowPruning(PlainSection):
    """``row_pruning``."""

    shared_parameters: RowPruningShared = Field(
        default_factory=RowPruningShared, description="Settings of all groups."
    )
    different_groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Groups by name; params: dense_ratio."
    )


class HeadPruning(PlainSection):
    """``head_pruning``."""

    shared_parameters: HeadPruningShared = Field(
        default_factory=HeadPruningShared, description="Settings of all groups."
    )
    different_groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Groups by name; params: dense_ratio."
    )


class ChannelPruning(PlainSection):
    """``channel_pruning``."""

    shared_parameters: ChannelPruningShared = Field(
        default_factory=ChannelPruningShared, description="Settings of all groups."
    )
    different_groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Groups by name; params: dense_ratio."
    )


class CompressionConfig(PlainSection):
    """``compression_training``."""

    section: ClassVar[str] = COMPRESSION_TRAINING

    weight_quantization: WeightQuantization = Field(
        default_factory=WeightQuantization, description="Fewer bits for weights."
    )
    activation_quantization: ActivationQuantization = Field(
        default_factory=ActivationQuantization, description="Fewer bits for activations."
    )
    sparse_pruning: SparsePruning = Field(
        default_factory=SparsePruning, description="Remove single weights or blocks."
    )
    row_pruning: RowPruning = Field(default_factory=RowPruning, description="Remove rows.")
    head_pruning: HeadPruning = Field(
        default_factory=HeadPruning, description="Remove attention heads."
    )
    channel_pruning: ChannelPruning = Field(
        default_factory=ChannelPruning, description="Remove channels of convolutions."
    )
    layer_reduction: LayerReductionConfig = Field(
        default_factory=LayerReductionConfig, description="Start with fewer layers."
    )


# what each group's params say, by technique: ... where they must, else the default
GROUP_PARAMS: dict[str, dict[str, Any]] = {
    "weight_quantization": {"start_bits": ..., "target_bits": ..., "quantization_period": 1},
    "activation_quantization": {"bits": ...},
    "sparse_pruning": {"dense_ratio": ...},
    "row_pruning": {"dense_ratio": ...},
    "head_pruning": {"dense_ratio": ...},
    "channel_pruning": {"dense_ratio": ...},
}


def get_compression_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parse ``compression_training`` into a dictionary with all defaults.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) an enabled technique lacks what it needs.
        pydantic.ValidationError: a value does not fit.
    """
    section = section_of(param_dict, COMPRESSION_TRAINING)
    config = CompressionConfig(**section).model_dump()
    for technique, required in GROUP_PARAMS.items():
        named = "different_groups" in (section.get(technique) or {})
        _check_technique(technique, config[technique], required, named)
    return config


def _check_technique(
    technique: str, values: dict[str, Any], required: dict[str, Any], has_groups: bool
) -> None:
    """Fill in the groups' defaults; refuse an enabled technique that lacks what it needs."""
    where = f"compression_training.{technique}"
    shared, groups = values["shared_parameters"], values["different_groups"]
    if not shared["enabled"]:
        return
    if not has_groups and shared.get("method") != "snip_momentum":
        raise ConfigAssertionError(
            f"{where} is enabled and needs 'different_groups': say which modules it treats."
        )
    if "num_heads" in shared and shared["num_heads"] is None:
        raise ConfigAssertionError(f"{where} is enabled and needs shared_parameters.num_heads.")
    for name, group in groups.items():
        defaults = {key: value for key, value in required.items() if value is not ...}
        group["params"] = {**defaults, **group["params"]}
        for key in required:
            if key not in group["params"]:
                path = f"{where}.different_groups.{name}.params"
                raise ConfigAssertionError(f"{path} lacks '{key}': add it.")
