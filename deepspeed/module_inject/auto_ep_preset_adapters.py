# SPDX-License-Identifier: Apache-2.0
"""What a family's models do differently from one version of transformers to another."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from .auto_ep_presets.base import MoEModelPreset
from .auto_ep_presets.registry import PRESET_MODELS

_LAST_OLD = 4
"""The last major version whose experts are modules and whose blocks may return router logits."""


class PresetAdapter:
    """One preset as the installed transformers has it.

    Args:
        preset: the family.
    """

    def __init__(self, preset: MoEModelPreset) -> None:
        self.preset = preset

    def _installed_transformers_version(self) -> str | None:
        return _transformers_version()

    @property
    def is_old(self) -> bool:
        """Whether transformers is of version 4 or older."""
        version = self._installed_transformers_version()
        return version is not None and int(version.split(".")[0]) <= _LAST_OLD

    @property
    def masked_score(self) -> float:
        """What experts of groups that a token may not use score."""
        return self.preset.masked_score_of_old if self.is_old else float("-inf")

    @property
    def scores_in_logits_dtype(self) -> bool:
        """Whether scores are rounded to the dtype of the logits."""
        rule = self.preset.scores_in_logits_dtype
        return rule == "always" or (rule == "old" and self.is_old)

    def route_norm(self, hf_config: Any) -> bool:
        """Whether a model normalises the chosen scores."""
        rule = self.preset.route_norm
        return bool(getattr(hf_config, rule, True)) if isinstance(rule, str) else rule


@cache
def _transformers_version() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def get_preset_adapter(name: str) -> PresetAdapter:
    """The adapter of a preset.

    Raises:
        KeyError: no such preset.
    """
    return PresetAdapter(PRESET_MODELS[name])
