# SPDX-License-Identifier: Apache-2.0
"""The section ``zero_optimization.leaf_module``: modules whose params ZeRO-3 fetches all at once."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from ..config_utils import DeepSpeedConfigModel

DEFAULT_LEAF_MODULE_CLASSES: list[str] = [
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
]
DEFAULT_LEAF_MODULE_NAMES: list[str] = []
DEFAULT_LEAF_MODULE_NAME_SUFFIXES: list[str] = []


class DeepSpeedZeroLeafModuleConfig(DeepSpeedConfigModel):
    """``leaf_module``: modules whose params ZeRO-3 fetches all at once."""

    classes: list[str] = Field(
        default_factory=lambda: list(DEFAULT_LEAF_MODULE_CLASSES),
        description="Class names, bare or fully qualified; given ones replace the default list.",
    )
    names: list[str] = Field(
        default_factory=lambda: list(DEFAULT_LEAF_MODULE_NAMES),
        description="Full names of modules.",
    )
    name_suffixes: list[str] = Field(
        default_factory=lambda: list(DEFAULT_LEAF_MODULE_NAME_SUFFIXES),
        description="Ends of module names.",
    )

    @field_validator("classes", "names", "name_suffixes", mode="before")
    @classmethod
    def _list_without_repeats(cls, value: Any) -> Any:
        if value is None:
            return []
        texts = [value] if isinstance(value, str) else value
        return list(dict.fromkeys(texts)) if isinstance(texts, (list, tuple)) else texts
