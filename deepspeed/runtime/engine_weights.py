# SPDX-License-Identifier: Apache-2.0
"""Loading weights into an engine's module: all at once, or parameter by parameter where either side has them in slices."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..checkpoint.format import Model
from ..checkpoint.weights import SavedWeight, of_tensor
from ..utils.errors import explain
from .engine_checkpoint import has_slices
from .zero.optimizer import ZeroOptimizer
from .zero.own_slice import fill, shape_of


def load_module_state_dict(
    engine: Any,
    checkpoint: Mapping[str, Any],
    strict: bool = True,
    custom_load_fn: Any = None,
    fetch_z3_params: bool = False,
    z3_params_to_fetch: Any = None,
    allowed_missing_keys: Any = None,
) -> None:
    """Load `checkpoint['module']` into the engine's module.

    Args:
        engine: receives.
        checkpoint: a dict of model states.
        strict: keys must match.
        custom_load_fn: called as `custom_load_fn(src=state, dst=module)` instead.
        fetch_z3_params, z3_params_to_fetch: accepted; sharded parameters are gathered module by module anyway.
        allowed_missing_keys: names that may be absent though `strict`.

    Raises:
        RuntimeError: keys or shapes do not match.
    """
    weights = checkpoint[Model.MODULE]
    if custom_load_fn is not None:
        own = {name: p.dtype for p, name in engine.param_names.items()}
        whole = {name: _whole(value, own.get(name)) for name, value in weights.items()}
        custom_load_fn(src=whole, dst=engine.module)
        return
    allowed = set(allowed_missing_keys or ())
    in_pieces = has_slices(engine) or any(isinstance(v, SavedWeight) for v in weights.values())
    load = _load_each if in_pieces else _load_whole
    missing, unexpected = load(engine, weights, strict and not allowed)
    if strict and allowed and (unexpected or set(missing) - allowed):
        raise RuntimeError(
            explain(
                "the saved weights do not match the module outside AutoEP expert weights and others that may be absent",
                got=f"missing {sorted(set(missing) - allowed)}, unexpected {list(unexpected)}",
            )
        )


def _load_whole(
    engine: Any, weights: Mapping[str, Any], strict: bool
) -> tuple[list[str], list[str]]:
    found = engine.module.load_state_dict(weights, strict=strict)
    return found.missing_keys, found.unexpected_keys


def _whole(value: Any, dtype: torch.dtype | None) -> Any:
    return value.whole(dtype) if isinstance(value, SavedWeight) else value


def _load_each(
    engine: Any, weights: Mapping[str, Any], strict: bool
) -> tuple[list[str], list[str]]:
    """Fill parameter by parameter: no rank reads more of one than it keeps, and none waits for another."""
    module, optimizer = engine.module, engine.optimizer
    own = module.state_dict().keys()
    missing, unexpected = sorted(own - weights.keys()), sorted(weights.keys() - own)
    if engine.residency is not None:
        engine.residency.release_all()
    params = dict(module.named_parameters(remove_duplicate=False))
    first = {param: name for name, param in reversed(params.items()) if name in weights}
    errors: list[str] = []
    resident = optimizer.in_memory() if isinstance(optimizer, ZeroOptimizer) else nullcontext()
    with resident, torch.no_grad():
        for param, name in first.items():
            found = weights[name]
            weight = found if isinstance(found, SavedWeight) else of_tensor(found)
            if weight.shape != shape_of(param):
                errors.append(
                    f"{name} of shape {tuple(weight.shape)} for {tuple(shape_of(param))} here"
                )
                continue
            fill(param, weight.elements, weight.whole)
            if hasattr(param, "_refresh_master"):
                param._refresh_master()
    rest = {
        name: _whole(value, None)
        for name, value in weights.items()
        if name in own and name not in params
    }
    for prefix, child in module.named_modules():
        start = f"{prefix}." if prefix else ""
        child._load_from_state_dict(rest, start, {}, False, [], [], errors)
    if strict and (missing or unexpected):
        errors.append(f"missing {missing}, unexpected {unexpected}")
    if errors:
        raise RuntimeError(
            explain("the saved weights do not match the module", got="; ".join(errors))
        )
    return missing, unexpected
