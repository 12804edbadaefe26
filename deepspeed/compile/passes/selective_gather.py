# SPDX-License-Identifier: Apache-2.0
"""Parameters stay whole where there is memory for them, the smallest first: each spares two gathers per step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ..util import get_deepcompile_handle
from .contract import PassContract
from .prefetch import is_profile_incomplete, print_rank_0

NAME = "selective_gather"
CONTRACT = PassContract(requires=frozenset({"z3"}))
# Part of the memory that is left alone: what the allocator cannot use.
MEM_MARGIN = 0.1


def _compute_persistence_budget(
    all_graph_mem_records: Iterable[Sequence[tuple[str, int, int, int]]],
    total_mem: int,
    mem_margin: float,
) -> dict[str, int]:
    """The bytes that are free at the worst moment of all graphs."""
    records = [rows for rows in all_graph_mem_records if rows]
    usable = int(total_mem * (1 - mem_margin))
    resident = max((row[1] for rows in records for row in rows), default=0)
    transient = max((row[3] for rows in records for row in rows), default=0)
    return {
        "usable_mem": usable,
        "peak_resident_alloc": resident,
        "transient_peak": transient,
        "available_mem": max(0, usable - max(resident, transient)),
        "profiled_list_count": len(records),
    }


def selective_gather(
    gm: GraphModule,
    graph_id: int,
    graph_order: Any,
    profiling_results: Any,
    create_inputs_fn: Any,
    mem_budget: float,
    param_manager: Any,
    bwd: bool,
) -> GraphModule:
    """Choose the parameters when the last backward graph is there: then all that takes memory is known."""
    last = next((each for each, needs_backward in graph_order if needs_backward), None)
    if not bwd or graph_id != last:
        return gm
    if not all(_is_known(result) for result in profiling_results.values()):
        print_rank_0("no parameter is kept whole, on account of incomplete profiling data")
        return gm
    accelerator = get_accelerator()
    rows = [
        rows for result in profiling_results.values() for rows in (result.fwd_mem, result.bwd_mem)
    ]
    budget = _compute_persistence_budget(rows, accelerator.total_memory(), MEM_MARGIN)
    available = torch.tensor([budget["available_mem"]], device=_device(accelerator))
    dist.all_reduce(available, dist.ReduceOp.MIN)
    _keep_smallest(param_manager, int(available.item()))
    return gm


def _device(accelerator: Any) -> Any:
    """Where collectives take tensors from: by name, since the CPU has no number."""
    by_name = getattr(accelerator, "current_device_name", accelerator.current_device)
    return by_name()


def _is_known(result: Any) -> bool:
    complete = result.fwd_mem_complete and (result.bwd_mem_complete or not result.needs_backward)
    graphs = [graph for graph in (result.fwd_graph, result.bwd_graph) if graph is not None]
    return complete and not any(is_profile_incomplete(graph) for graph in graphs)


def _keep_smallest(param_manager: Any, available: int) -> None:
    found: dict[int, tuple[int, int]] = {}
    for managed in param_manager.values():
        for name, param in managed.params.items():
            ds_id = managed.ds_ids[name]
            if not param.param.ds_persist:
                found[ds_id] = (param.numel * param.dtype.itemsize, ds_id)
    handle = get_deepcompile_handle()
    for size, ds_id in sorted(found.values()):
        if size > available:
            return
        available -= size
        handle.set_persistent(ds_id)
