# SPDX-License-Identifier: Apache-2.0
"""Wrapping a model's layers for random-LTD, and its weights under the names that they had before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from deepspeed.utils.errors import explain
from deepspeed.utils.module_utils import recursive_setattr

from ...config_errors import ConfigValueError
from .basic_layer import RandomLayerTokenDrop

_WRAPPED = "random_ltd_layer."


def convert_to_random_ltd(model: Any, convert_type: type[nn.Module] | str) -> Any:
    """Wrap the layers of a type that ``random_ltd_layer_id`` names, counted in the model's order.

    Args:
        model: the engine of `deepspeed.initialize`; it is changed and returned. A module without engine has all layers
            of the type wrapped, and drops nothing before their `init_config`.
        convert_type: the class of the layers, or its name.

    Raises:
        ValueError: (as ``ConfigValueError``) the engine has no random-LTD, or fewer such layers than the numbers say.
    """
    engine = model if hasattr(model, "random_ltd_config") else None
    module = model if engine is None else engine.module
    names = [name for name, layer in module.named_modules() if _is_a(layer, convert_type)]
    chosen = set(range(len(names)))
    config: Mapping[str, Any] = {}
    if engine is not None:
        config = engine.random_ltd_config()
        if engine.random_ltd_scheduler is None:
            raise ConfigValueError(
                explain(
                    "the engine was not configured for random-LTD",
                    fix="enable data_efficiency, data_routing and random_ltd in its configuration",
                )
            )
        chosen = set(config["random_ltd_layer_id"])
    beyond = sorted(number for number in chosen if not 0 <= number < len(names))
    if beyond or not names:
        raise ConfigValueError(
            explain(
                "random-LTD is asked for on layers that the model does not have",
                got=f"layers {beyond} of {getattr(convert_type, '__name__', convert_type)}",
                expected=f"numbers below {len(names)}",
            )
        )
    for number, name in enumerate(names):
        if number not in chosen:
            continue
        layer = RandomLayerTokenDrop(module.get_submodule(name))
        layer.train(layer.random_ltd_layer.training)
        if engine is not None:
            layer.init_config(config, engine.random_ltd_scheduler, number)
        recursive_setattr(module, name, layer)
    if engine is not None:
        engine.param_names = {param: name for name, param in module.named_parameters()}
        if getattr(engine.optimizer, "param_names", None):  # a ZeRO optimizer's, for checkpoints
            engine.optimizer.param_names = dict(engine.param_names)
    return model


def _is_a(layer: nn.Module, kind: type[nn.Module] | str) -> bool:
    return type(layer).__name__ == kind if isinstance(kind, str) else isinstance(layer, kind)


def save_without_random_ltd(model: Any) -> OrderedDict[str, Any]:
    """The state dict of a model (or engine), with the names from before `convert_to_random_ltd`."""
    return remove_random_ltd_state_dict(model.state_dict())


def remove_random_ltd_state_dict(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state dict with the names from before `convert_to_random_ltd`; dicts inside of it too."""
    return OrderedDict(
        (
            key.replace(_WRAPPED, ""),
            remove_random_ltd_state_dict(value) if isinstance(value, Mapping) else value,
        )
        for key, value in state_dict.items()
    )
