# SPDX-License-Identifier: Apache-2.0
"""Replaces the layers of a model that a configuration wants quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepspeed.runtime.zero.codec import modules_by_name, named_schemes
from deepspeed.utils.errors import DeepSpeedConfigError, explain

from .layers import QUANTIZATION_LAYER_MAPPINGS


def _init_group_wise_weight_quantization(
    model: torch.nn.Module, ds_config: Mapping[str, Any]
) -> torch.nn.Module:
    """Replace Linear and Embedding layers by quantized ones, by `weight_quantization.post_init_quant`.

    Args:
        model: changed in place; its weights may be sharded already.
        ds_config: a configuration as a dict. Keys of the section are parts of module names, its values
            {num_bits, group_size, group_dim, symmetric}.

    Returns:
        The model.

    Raises:
        DeepSpeedConfigError: no such section, settings that cannot be, or two keys that are part of one name.
        ValueError: a weight does not divide into groups.
    """
    section = ds_config.get("weight_quantization")
    if not section or "post_init_quant" not in section:
        raise DeepSpeedConfigError(
            explain(
                "there is nothing in the configuration that says how to quantize",
                got=f"keys {sorted(ds_config)}",
                expected="'weight_quantization': {'post_init_quant': {part of module names: {num_bits, group_size, …}}}",
            )
        )
    settings = section["post_init_quant"]
    schemes = named_schemes(section)
    by_scheme = {scheme: settings[key] for key, scheme in schemes.items()}
    done: dict[torch.nn.Module, torch.nn.Module] = {}
    for name, scheme in modules_by_name(model, schemes).items():
        old = model.get_submodule(name)
        kind = QUANTIZATION_LAYER_MAPPINGS.get(type(old))
        if kind is None:
            continue
        if old not in done:
            done[old] = kind(by_scheme[scheme], old)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, done[old])
    return model
