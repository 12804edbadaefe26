# SPDX-License-Identifier: Apache-2.0
"""The section ``compile``: DeepCompile's graph passes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..runtime.config_utils import DeepSpeedConfigModel

PassName = Literal["z1", "z3", "autosp", "autotp"]


class CompileConfig(DeepSpeedConfigModel):
    """``compile``: what ``engine.compile()`` does beyond ``torch.compile``."""

    deepcompile: bool = Field(
        default=False, description="Move ZeRO's communication into the graph."
    )
    autoep_non_moe: bool = Field(
        default=False, description="Compile the parts outside the experts."
    )
    free_activation: bool = Field(
        default=False, description="Free activations before the backward pass."
    )
    free_activation_threshold: int = Field(
        default=10 * 2**20, description="Only those above these bytes."
    )
    offload_activation: bool = Field(default=False, description="Keep activations in host memory.")
    offload_activation_pin_memory: bool = Field(
        default=True, description="Page-locked host memory."
    )
    offload_opt_states: bool = Field(
        default=False, description="Keep optimizer states in host memory."
    )
    double_buffer: bool = Field(default=True, description="Gather into two buffers in turn.")
    symmetric_memory: bool = Field(default=False, description="Use torch's symmetric memory.")
    debug_log: bool = Field(
        default=False, description="Write the graphs and their passes to files."
    )
    offload_parameters: bool = Field(default=False, description="Keep params in host memory.")
    sync_before_reduce: bool = Field(
        default=False, description="Wait for the device before reducing."
    )
    sync_after_reduce: bool = Field(
        default=False, description="Wait for the device after reducing."
    )
    sync_before_allgather: bool = Field(
        default=False, description="Wait for the device before gathering."
    )
    sync_after_allgather: bool = Field(
        default=False, description="Wait for the device after gathering."
    )
    keep_int_input_tensors: bool = Field(
        default=True, description="Keep integer inputs for backward."
    )
    keep_all_input_tensors: bool = Field(default=False, description="Keep all inputs for backward.")
    passes: list[PassName] | None = Field(
        default=None, description="Passes to run, of z1, z3, autosp, autotp; null chooses by stage."
    )
