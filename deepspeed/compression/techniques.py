# SPDX-License-Identifier: Apache-2.0
"""The techniques of ``compression_training``: what a configuration asks for, as groups of a model's modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .helper import compressed_type

# the method of sparse_pruning that has no groups
SNIP = "snip_momentum"
# technique -> the settings that a layer's `enable_<technique>` takes, in its order. In the order of cleaning: bits
# first, so that scales are those of training; single weights before whole rows go.
TECHNIQUES: dict[str, tuple[str, ...]] = {
    "weight_quantization": (
        "start_bits",
        "target_bits",
        "quantization_period",
        "quantize_weight_in_forward",
        "quantization_type",
        "quantize_groups",
    ),
    "activation_quantization": ("bits", "quantization_type", "range_calibration"),
    "sparse_pruning": ("dense_ratio", "method"),
    "row_pruning": ("dense_ratio", "method"),
    "head_pruning": ("dense_ratio", "method", "num_heads"),
    "channel_pruning": ("dense_ratio", "method"),
}
# technique -> the method by which layers, and those related to them, are cleaned
CLEANING = {
    "row_pruning": "fix_row_col_pruning_helper",
    "head_pruning": "fix_head_pruning_helper",
    "channel_pruning": "fix_channel_pruning_helper",
}


@dataclass(frozen=True)
class Group:
    """The modules that one pattern names, and what is done to them.

    Attributes:
        technique: its name in the configuration.
        name: the group's.
        settings: the technique's shared ones and the group's own.
        modules: dotted names.
        related: for each module, the names of those that lose the same rows.
    """

    technique: str
    name: str
    settings: Mapping[str, Any]
    modules: list[str]
    related: list[list[str]] = field(default_factory=list)

    @property
    def arguments(self) -> list[Any]:
        """What a layer's `enable_<technique>` is called with."""
        return [self.settings[key] for key in TECHNIQUES[self.technique]]


def shared(config: Mapping[str, Any], technique: str) -> Mapping[str, Any]:
    """A technique's settings for all groups."""
    return config[technique]["shared_parameters"]


def groups_of(model: nn.Module, config: Mapping[str, Any], mpu: Any = None) -> list[Group]:
    """What an enabled configuration asks for of a model.

    Raises:
        ValueError: a module is in two groups of a technique, or related modules are not as many as their modules.
    """
    found: list[Group] = []
    for technique in TECHNIQUES:
        settings = shared(config, technique)
        if not settings["enabled"] or settings.get("method") == SNIP:
            continue
        taken: dict[str, str] = {}
        for name, entry in config[technique]["different_groups"].items():
            for group in _groups(model, technique, name, {**entry, "shared": settings}, mpu):
                for module in group.modules:
                    if taken.setdefault(module, name) != name:
                        raise ValueError(
                            f"{module} is already added to compression, please check your config file for {name}: "
                            f"{technique} has it in the group {taken[module]}."
                        )
                found.append(group)
    return found


def _groups(
    model: nn.Module, technique: str, name: str, entry: Mapping[str, Any], mpu: Any
) -> Iterator[Group]:
    settings = {**entry["shared"], **entry["params"]}
    related = entry["related_modules"]
    if related is not None and len(related) != len(entry["modules"]):
        raise ValueError(
            explain(
                f"related_modules of the group {name} of {technique} do not match its modules",
                got=f"{len(related)} lists for {len(entry['modules'])} patterns",
                expected="one list for each pattern",
            )
        )
    for number, pattern in enumerate(entry["modules"]):
        modules = matching(model, pattern, f"enable_{technique}", mpu)
        if not modules:
            logger.warning(
                f"{technique}, group {name}: no module that it can treat has a name like {pattern!r}"
            )
        if related is None or not modules:
            yield Group(technique, name, settings, modules)
            continue
        others = [matching(model, other, CLEANING[technique], mpu) for other in related[number]]
        for other, names in zip(related[number], others, strict=True):
            if not names:
                logger.warning(f"{technique}, group {name}: no module has a name like {other!r}")
            elif len(names) != len(modules):
                raise ValueError(
                    explain(
                        f"related modules of the group {name} of {technique} are not as many as their modules",
                        got=f"{len(names)} like {other!r}: {names}",
                        expected=f"{len(modules)}, one for each of {modules}",
                    )
                )
        present = [names for names in others if names]
        each = [[names[place] for names in present] for place in range(len(modules))]
        yield Group(technique, name, settings, modules, each)


def matching(model: nn.Module, pattern: str, method: str, mpu: Any = None) -> list[str]:
    """Names that a pattern is found in, of the layers whose compressed form has a method; ``*`` is found in all."""
    search = re.compile("" if pattern == "*" else pattern).search
    return [
        name
        for name, module in model.named_modules()
        if search(name) and hasattr(compressed_type(module, mpu), method)
    ]
