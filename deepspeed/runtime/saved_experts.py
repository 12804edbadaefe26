# SPDX-License-Identifier: Apache-2.0
"""What an engine saves of experts that AutoEP spread: what a checkpoint says of them, and weights as the model had them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.constants import (
    AUTOEP_PER_EXPERT_FILES_FORMAT,
    AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY,
    AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION,
    AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION_KEY,
    AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT,
)
from ..checkpoint.model_states import moe_prefixes
from ..checkpoint.stacked_experts import WEIGHTS, check_total
from ..comm import flat
from ..utils.errors import explain


def spread_layers(module: torch.nn.Module) -> list[tuple[int, str, Any]]:
    """AutoEP's layers: the number among all layers of experts, the name, and the layer."""
    found = [(i, name, module.get_submodule(name)) for i, name in enumerate(moe_prefixes(module))]
    return [entry for entry in found if getattr(entry[2], "_is_autoep_layer", False)]


def entries_of(engine: Any) -> list[dict[str, Any]] | None:
    """What a model file says of AutoEP's layers; None without any."""
    cut = engine.residency is not None
    entries = []
    for number, name, layer in spread_layers(engine.module):
        copies = engine.mesh.expert_data[layer.ep_group_name]
        first = layer.ep_rank * layer.num_local_experts
        entries.append(
            {
                "moe_layer_id": number,
                "module_path": name,
                "num_experts": layer.num_experts,
                "num_local_experts": layer.num_local_experts,
                "ep_size": layer.ep_size,
                "expert_key_prefix": f"{name}.experts",
                AUTOEP_ZERO3_EXPERT_STATE_FORMAT_KEY: (
                    AUTOEP_ZERO3_PARTITIONED_EXPERT_STATE_FORMAT
                    if cut
                    else AUTOEP_PER_EXPERT_FILES_FORMAT
                ),
                AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION_KEY: (
                    AUTOEP_ZERO3_EXPERT_STATE_FORMAT_VERSION if cut else None
                ),
                "ep_group_name": layer.ep_group_name,
                "ep_rank": layer.ep_rank,
                "expert_data_parallel_rank": copies.rank,
                "expert_data_parallel_world_size": copies.size,
                "global_expert_start": first,
                "global_expert_end": first + layer.num_local_experts,
            }
        )
    return entries or None


def shares_of(engine: Any) -> dict[str, tuple[int, int]]:
    """This rank's place among those that share the experts, and their number, by name of each stacked weight."""
    return {
        f"{name}.experts.{weight}": (layer.ep_rank, layer.ep_size)
        for _, name, layer in spread_layers(engine.module)
        for weight in WEIGHTS
    }


def share_windows(
    engine: Any, own: Mapping[str, torch.Size], saved: Mapping[str, torch.Size]
) -> dict[str, tuple[int, torch.Size]]:
    """Which elements of saved stacks are this rank's.

    Raises:
        ValueError: the checkpoint has another number of experts.
    """
    windows = {}
    for name, (rank, ranks) in shares_of(engine).items():
        if name in saved and name in own:
            check_total(name, saved[name][0], own[name][0], ranks)
            windows[name] = (rank * own[name].numel(), own[name])
    return windows


def refuse_frozen_slices(engine: Any) -> None:
    """Refuse to save frozen experts of ZeRO stage 3.

    Raises:
        NotImplementedError: there are some, spread over several ranks.
    """
    frozen = [
        name
        for _, name, layer in spread_layers(engine.module)
        if layer.ep_size > 1 and not all(p.requires_grad for p in layer.experts.parameters())
    ]
    if frozen:
        raise NotImplementedError(
            explain(
                "frozen experts that are spread over ranks cannot be saved at ZeRO stage 3",
                got=", ".join(frozen),
                fix="set zero_optimization.stage to 2",
            )
        )


def as_the_model_had_them(engine: Any, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Weights with all experts, under the names of the model that AutoEP was given; a collective.

    Args:
        engine: of a stage below 3.
        state: the module's weights in host memory on the rank that wants them, None on the others.
    """
    result = None if state is None else OrderedDict(state)
    for _, name, layer in spread_layers(engine.module):
        axis = engine.mesh.expert[layer.ep_group_name]
        whole = {}
        for weight in WEIGHTS:
            own = getattr(layer.experts, weight).detach()
            everybody = own.new_empty((axis.size * own.shape[0], *own.shape[1:]))
            flat.all_gather_into(everybody.view(-1), own.contiguous().view(-1), axis)
            if state is not None:
                whole[weight] = everybody.cpu()
        if result is not None:
            result = _put(result, name, layer, whole)
    return result


def _put(
    state: OrderedDict[str, Any], name: str, layer: Any, whole: dict[str, torch.Tensor]
) -> OrderedDict[str, Any]:
    """The same state with one layer's weights under their former names, in the same place."""
    result: OrderedDict[str, Any] = OrderedDict()
    router = f"{name}.router."
    done = False
    for key, value in state.items():
        if key.startswith(router):
            kept = key.removeprefix(router).removeprefix("gate.")
            result[f"{name}.{layer.spec.router_name}.{kept}"] = value
        elif key.startswith(f"{name}.experts."):
            if not done:
                sources = layer.source_weights(whole).items()
                prefix = f"{name}.{layer.spec.experts_name}"
                result.update((f"{prefix}.{former}", tensor) for former, tensor in sources)
            done = True
        else:
            result[key] = value
    return result
