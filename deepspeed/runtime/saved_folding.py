# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ranks that share experts as well as layers (AutoEP with AutoTP): who writes what, and what files say of it.

Experts go round over all ranks, so of those with the same experts each tensor-parallel place writes its own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint import autoep_universal
from ..checkpoint import format as names
from ..checkpoint.format import Model
from ..comm.mesh import Axis
from .saved_experts import spread_layers


def lanes_of(engine: Any) -> tuple[int, int]:
    """The number of tensor-parallel ranks that share experts, and this rank's place; (1, 0) where none do."""
    tensor = engine.mesh.tensor
    return (1, 0) if engine._autoep_folding_spec is None else (tensor.size, tensor.rank)


def writes_experts(engine: Any, copies: Axis) -> bool:
    """Whether this rank writes its experts: the first in its place of the ranks that have the same."""
    lanes, lane = lanes_of(engine)
    return all(rank % lanes != lane for rank in copies.ranks[: copies.rank])


def expert_places(engine: Any) -> int:
    """How many ranks' experts there are among the ranks of this rank's tensor-parallel place."""
    spread = max((axis.size for axis in engine.mesh.expert.values()), default=1)
    lanes, lane = lanes_of(engine)
    return len({rank % spread for rank in range(lane, engine.mesh.world.size, lanes)})


def note(engine: Any, files: Mapping[str, dict[str, Any]]) -> None:
    """Say in all files of a folded run over which ranks it was."""
    if engine._autoep_folding_spec is None:
        return
    for name, content in files.items():
        content[Model.FOLDING] = _entry(engine, name)


def check(engine: Any, model: Mapping[str, Any]) -> None:
    """Compare what a model file says with this run.

    Raises:
        RuntimeError: one is folded and the other is not, or they differ.
    """
    if engine.has_moe_layers:
        autoep_universal.check_folding(model, engine._autoep_folding_spec)


def _entry(engine: Any, file: str) -> dict[str, Any]:
    layers = spread_layers(engine.module)
    layer, dense = layers[0][2], engine.mesh.sequence_data
    copies = engine.mesh.expert_data[layer.ep_group_name]
    family, group, axis, params = "dense", "dense_dp", dense, _families(engine)
    routed = {name for name in params if ".experts." in name}
    if names.expert_of(file) is not None and not file.endswith("optim_states.pt"):
        family, group, axis, params = "routed_expert", "edp", copies, None
    elif file.endswith("optim_states.pt"):
        family, group = "zero_optimizer_state", "per_family"
        params = {
            name: {
                "family": what,
                "zero_partition_group": "edp" if name in routed else "dense_dp",
                "zero_partition_count": copies.size if name in routed else dense.size,
            }
            for name, what in params.items()
        }
    else:
        params = {name: what for name, what in params.items() if name not in routed}
    return autoep_universal.make_folding_metadata(
        tp_size=engine.mesh.tensor.size,
        tp_rank=engine.mesh.tensor.rank,
        ep_size=layer.ep_size,
        ep_rank=layer.ep_rank,
        zero_partition_group=group,
        zero_partition_rank=axis.rank,
        zero_partition_count=axis.size,
        family=family,
        param_families=params,
    )


def _families(engine: Any) -> dict[str, Any]:
    layers = spread_layers(engine.module)
    experts = {id(p) for _, _, layer in layers for p in layer.experts.parameters()}
    routers = {id(p) for _, _, layer in layers for p in layer.router.parameters()}

    def family(param: Any) -> str:
        if id(param) in experts:
            return "routed_expert"
        return "router_gate_replicated" if id(param) in routers else "dense"

    return {name: family(param) for param, name in engine.param_names.items()}
