# SPDX-License-Identifier: Apache-2.0
"""The section ``autotuning``: the search for a fast ZeRO stage and batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..runtime.config_utils import PlainSection


class DeepSpeedAutotuningConfig(PlainSection):
    """``autotuning``."""

    section: ClassVar[str] = "autotuning"

    enabled: bool = Field(default=False, description="Search; set by the launcher's --autotuning.")
    fast: bool = Field(default=True, description="Tune micro-batch sizes only, at one stage each.")
    results_dir: str = Field(default="autotuning_results", description="Folder of the results.")
    exps_dir: str = Field(
        default="autotuning_exps", description="Folder of the experiments' configs."
    )
    overwrite: bool = Field(default=True, description="Run again where results exist.")
    start_profile_step: int = Field(default=3, description="First measured step.")
    end_profile_step: int = Field(default=5, description="Last measured step.")
    start_step: int | None = Field(default=None, description="Legacy name of start_profile_step.")
    end_step: int | None = Field(default=None, description="Legacy name of end_profile_step.")
    metric: str = Field(
        default="throughput",
        description="What to optimise: latency, throughput, flops, forward, backward or step.",
    )
    metric_path: str | None = Field(default=None, description="File where a run leaves its metric.")
    tuner_type: str = Field(default="gridsearch", description="gridsearch, random or model_based.")
    tuner_early_stopping: int = Field(
        default=5, description="Stop after so many trials without gain."
    )
    tuner_num_trials: int = Field(default=50, description="At most so many trials.")
    arg_mappings: dict[str, Any] | None = Field(
        default=None,
        description="Config key -> command-line argument of the script that sets it too.",
    )
    model_info: dict[str, Any] | None = Field(
        default=None, description="profile, num_params, hidden_size, num_layers of the model."
    )
    model_info_path: str | None = Field(default=None, description="File where model_info is kept.")
    mp_size: int = Field(default=1, description="Model-parallel ranks.")
    max_train_batch_size: int | None = Field(default=None, description="Bound of train_batch_size.")
    min_train_batch_size: int = Field(default=1, description="Bound of train_batch_size.")
    max_train_micro_batch_size_per_gpu: int = Field(
        default=1024, description="Bound of the micro batch."
    )
    min_train_micro_batch_size_per_gpu: int = Field(
        default=1, description="Bound of the micro batch."
    )
    num_tuning_micro_batch_sizes: int = Field(default=3, description="Micro-batch sizes to try.")


def get_autotuning_config(param_dict: Mapping[str, Any]) -> DeepSpeedAutotuningConfig:
    """Parse section ``autotuning`` of a whole configuration."""
    return DeepSpeedAutotuningConfig.of(param_dict)
