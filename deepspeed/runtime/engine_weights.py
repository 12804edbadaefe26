# SPDX-License-Identifier: Apache-2.0
"""Loading weights into an engine's module: whole ones, or one module at a time where its parameters are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ..checkpoint.format import Model
from ..utils.errors import explain
from .engine_checkpoint import has_slices
from .zero.optimizer import ZeroOptimizer
from .zero.partition_parameters import GatheredParameters


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
        custom_load_fn(src=weights, dst=engine.module)
        return
    allowed = set(allowed_missing_keys or ())
    load = _load_slices if has_slices(engine) else _load_whole
    missing, unexpected = load(engine, weights, strict and not allowed)
    if strict and allowed and (unexpected or set(missing) - allowed):
        raise RuntimeError(
            explain(
                "the saved weights do not match the module",
                got=f"missing {sorted(set(missing) - allowed)}, unexpected {list(unexpected)}",
            )
        )


def _load_whole(
    engine: Any, weights: Mapping[str, Any], strict: bool
) -> tuple[list[str], list[str]]:
    found = engine.module.load_state_dict(weights, strict=strict)
    return found.missing_keys, found.unexpected_keys


def _load_slices(
    engine: Any, weights: Mapping[str, Any], strict: bool
) -> tuple[list[str], list[str]]:
    """Load into sharded parameters, one module at a time; every rank has the same weights."""
    own = engine.module.state_dict().keys()
    missing, unexpected = sorted(own - weights.keys()), sorted(weights.keys() - own)
    errors: list[str] = []
    optimizer = engine.optimizer
    resident = optimizer.in_memory() if isinstance(optimizer, ZeroOptimizer) else nullcontext()
    with resident:
        for prefix, module in engine.module.named_modules():
            with GatheredParameters(list(module.parameters(recurse=False)), modifier_rank=0):
                start = f"{prefix}." if prefix else ""
                module._load_from_state_dict(dict(weights), start, {}, False, [], [], errors)
    engine.residency.release_all()
    if strict and (missing or unexpected):
        errors.append(f"missing {missing}, unexpected {unexpected}")
    if errors:
        raise RuntimeError(
            explain("the saved weights do not match the module", got="; ".join(errors))
        )
    return missing, unexpected
