# SPDX-License-Identifier: Apache-2.0
"""Has a model find the router logits that it collects in the layers that took the place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from deepspeed.moe.ep_router import RouterGate

_KEY = "router_logits"


def collecting_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a Hugging Face model that say whose outputs they collect."""
    return [module for module in model.modules() if getattr(module, "_can_record_outputs", None)]


def capture_target(
    collecting: Sequence[nn.Module], block: nn.Module, router: nn.Module
) -> tuple[str, int | None, str | None]:
    """Whose output a Hugging Face model collects as router logits.

    Args:
        collecting: the model's `collecting_modules`.
        block: a layer of experts.
        router: its router.

    Returns:
        "router", "moe_block" or "none", the index in its output, and the layer name that restricts it.
    """
    for _, recorder in _recorders(collecting):
        kind = _kind_of(recorder)
        for name, module in (("router", router), ("moe_block", block)):
            if isinstance(kind, type) and isinstance(module, kind):
                index = getattr(recorder, "index", 1)
                return name, index, getattr(recorder, "layer_name", None)
    return "none", None, None


def record_router_logits(
    collecting: Sequence[nn.Module], spec: Any, source: nn.Module, made: nn.Module
) -> None:
    """Have the model of these `collecting_modules` collect the logits of the new layer's gate where it collected those of `source`."""
    if spec.router_logits_capture_target == "none":
        return
    router = getattr(source, spec.router_name)
    old = router if spec.router_logits_capture_target == "router" else source
    for owner, recorder in _recorders(collecting):
        kind = _kind_of(recorder)
        if not (isinstance(kind, type) and isinstance(old, kind)):
            continue
        recorded = owner._can_record_outputs
        present = recorded[_KEY] if isinstance(recorded[_KEY], list) else [recorded[_KEY]]
        if not any(_kind_of(other) is RouterGate for other in present):
            # the dict is the class's, which the library's registry holds too; it is changed in place
            recorded[_KEY] = [*present, _recorder_of_gates(recorder)]
        if getattr(owner, "_output_capturing_hooks_installed", False):
            _install_hook(made)


def _recorders(collecting: Sequence[Any]) -> list[tuple[Any, Any]]:
    found = []
    for module in collecting:
        entries = module._can_record_outputs.get(_KEY, [])
        for entry in entries if isinstance(entries, list) else [entries]:
            found.append((module, entry))
    return found


def _kind_of(recorder: Any) -> Any:
    return getattr(recorder, "target_class", recorder)


def _recorder_of_gates(like: Any) -> Any:
    try:
        from transformers.utils.output_capturing import OutputRecorder
    except ImportError:  # transformers 4
        from transformers.utils.generic import OutputRecorder
    return OutputRecorder(RouterGate, index=0, layer_name=getattr(like, "layer_name", None))


def _install_hook(made: nn.Module) -> None:
    """The model was run before: its hooks are in place, and the new gate needs its own."""
    from transformers.utils.output_capturing import install_output_capuring_hook

    install_output_capuring_hook(made.router.gate, _KEY, 0)
