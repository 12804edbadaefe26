# SPDX-License-Identifier: Apache-2.0
"""The sections ``data_efficiency`` and ``curriculum_learning`` (legacy): what the model is shown, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..config_errors import ConfigAssertionError, ConfigKeyError
from ..config_utils import OpenSection, section_of


class CurriculumLearningConfig(OpenSection):
    """``data_efficiency.data_sampling.curriculum_learning``; its metrics are kept as they are."""

    enabled: bool = Field(default=False, description="Show easy samples first.")


class DynamicBatchingConfig(OpenSection):
    """``data_efficiency.data_sampling.dynamic_batching``."""

    enabled: bool = Field(default=False, description="Batches of about as many tokens each.")
    lr_scaling_method: str = Field(default="linear", description="linear, sqrt or none.")
    min_batch_size: int = Field(default=1, description="Fewest samples of a batch.")
    max_batch_size: int | None = Field(default=None, description="Most samples of a batch.")
    sequence_picking_order: str = Field(
        default="dataloader", description="random, seqlen or dataloader."
    )
    verbose: bool = Field(default=False, description="Print the batches.")


class DataSamplingConfig(OpenSection):
    """``data_efficiency.data_sampling``."""

    enabled: bool = Field(default=False, description="Choose samples by difficulty or length.")
    num_epochs: int = Field(default=1000, description="Epochs that the sampler plans.")
    num_workers: int = Field(default=0, description="Worker processes of the loader.")
    pin_memory: bool = Field(default=False, description="Use page-locked host memory.")
    curriculum_learning: CurriculumLearningConfig = Field(
        default_factory=CurriculumLearningConfig, description="Show easy samples first."
    )
    dynamic_batching: DynamicBatchingConfig = Field(
        default_factory=DynamicBatchingConfig, description="Batches of about as many tokens each."
    )


class LayerTokenLrConfig(OpenSection):
    """``random_ltd.layer_token_lr_schedule``."""

    enabled: bool = Field(default=False, description="Not available: leave it false.")


class RandomLTDConfig(OpenSection):
    """``data_efficiency.data_routing.random_ltd``."""

    enabled: bool = Field(default=False, description="Drop random tokens in the middle layers.")
    layer_token_lr_schedule: LayerTokenLrConfig = Field(
        default_factory=LayerTokenLrConfig, description="Scale the learning rate by kept tokens."
    )


class DataRoutingConfig(OpenSection):
    """``data_efficiency.data_routing``."""

    enabled: bool = Field(default=False, description="Let tokens skip layers.")
    random_ltd: RandomLTDConfig = Field(
        default_factory=RandomLTDConfig, description="Random layerwise token dropping."
    )


class DataEfficiencyConfig(OpenSection):
    """``data_efficiency``."""

    section: ClassVar[str] = "data_efficiency"

    enabled: bool = Field(default=False, description="Use data sampling or data routing.")
    seed: int = Field(default=1234, description="Seed of the samplers.")
    data_sampling: DataSamplingConfig = Field(
        default_factory=DataSamplingConfig, description="Which samples are shown."
    )
    data_routing: DataRoutingConfig = Field(
        default_factory=DataRoutingConfig, description="Which tokens pass which layers."
    )


class LegacyCurriculumConfig(OpenSection):
    """``curriculum_learning`` at the top level; its schedule is kept as it is."""

    section: ClassVar[str] = "curriculum_learning"

    enabled: bool = Field(default=False, description="Legacy: grow the sequence length.")


class ProgressiveLayerDropConfig(OpenSection):
    """``progressive_layer_drop``."""

    section: ClassVar[str] = "progressive_layer_drop"

    enabled: bool = Field(default=False, description="Skip layers more and more often.")
    theta: float = Field(default=1.0, description="Least share of layers that is kept.")
    gamma: float = Field(default=0.001, description="Speed of the change, per step.")


def get_data_efficiency_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parse ``data_efficiency`` of a whole configuration into a dictionary with all defaults.

    Raises:
        AssertionError: (as ``ConfigAssertionError``) a part is enabled without what it needs.
    """
    config = DataEfficiencyConfig.of(param_dict).model_dump()
    needs = {"curriculum_learning": "curriculum_metrics", "dynamic_batching": "max_tokens"}
    for part, key in needs.items():
        values = config["data_sampling"][part]
        if values["enabled"] and key not in values:
            where = f"data_efficiency.data_sampling.{part}"
            raise ConfigAssertionError(f"{where} is enabled and needs '{key}': add it.")
    return config


def get_curriculum_params_legacy(param_dict: Mapping[str, Any]) -> dict[str, Any] | bool:
    """Return the legacy curriculum without its switch, or False where the section is absent.

    Raises:
        KeyError: (as ``ConfigKeyError``) the section has no 'enabled'.
    """
    if param_dict.get("curriculum_learning") is None:
        return False
    section = section_of(param_dict, "curriculum_learning")
    if "enabled" not in section:
        raise ConfigKeyError(
            "section 'curriculum_learning' lacks 'enabled': set it to true or false."
        )
    return {key: value for key, value in section.items() if key != "enabled"}
