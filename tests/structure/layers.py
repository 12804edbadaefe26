# SPDX-License-Identifier: Apache-2.0
"""The one table of layers: a module may import modules of its own layer or below, never above.

The longest dotted prefix that matches a module decides. A module that no row covers fails the test: every file has
a place. The picture behind the table is in the architecture notes (README, "How it is built").
"""

from __future__ import annotations

# prefix -> layer; 0 is the ground (standard library and torch only), 7 are the public doors
LAYERS: dict[str, int] = {
    # L7: doors
    "deepspeed": 7,  # the package's own __init__: exact match only, see EXACT
    "deepspeed.__main__": 7,
    "deepspeed.comm.bench": 7,
    "deepspeed.elasticity.cli": 7,
    "deepspeed.env_report": 7,
    "deepspeed.nvme": 7,
    "deepspeed.pipe": 7,
    "deepspeed.launcher": 7,
    # L6: what a user holds in the hand
    "deepspeed.runtime.engine": 6,
    "deepspeed.runtime.initialize": 6,
    "deepspeed.runtime.engine_accessors": 6,
    "deepspeed.runtime.engine_compile": 6,
    "deepspeed.runtime.engine_data": 6,
    "deepspeed.runtime.engine_dtypes": 6,
    "deepspeed.runtime.engine_experts": 6,
    "deepspeed.runtime.hybrid_engine": 6,
    "deepspeed.inference": 6,
    "deepspeed.runtime.pipe": 6,
    # L5: builders and features around the training state
    "deepspeed.runtime.backward": 5,
    "deepspeed.runtime.build": 5,
    "deepspeed.runtime.build_checks": 5,
    "deepspeed.runtime.build_order": 5,
    "deepspeed.runtime.build_mesh": 5,
    "deepspeed.runtime.drivers": 5,
    "deepspeed.runtime.module_prep": 5,
    "deepspeed.runtime.optimizers": 5,
    "deepspeed.runtime.clock": 5,
    "deepspeed.runtime.engine_checkpoint": 5,
    "deepspeed.runtime.engine_load": 5,
    "deepspeed.runtime.engine_weights": 5,
    "deepspeed.runtime.forward_kwargs": 5,
    "deepspeed.runtime.checkpoint_engine": 5,
    "deepspeed.runtime.observers": 5,
    "deepspeed.runtime.compressing": 5,
    "deepspeed.runtime.ownership": 5,
    "deepspeed.runtime.quantize": 5,
    "deepspeed.runtime.state_dict_factory": 5,
    "deepspeed.runtime.weight_quantizer": 5,
    "deepspeed.runtime.memory_plan": 5,
    "deepspeed.autotuning": 5,
    "deepspeed.compile": 5,
    "deepspeed.compression": 5,
    "deepspeed.elasticity": 5,
    "deepspeed.inference.quantization": 5,
    "deepspeed.nebula": 5,
    "deepspeed.runtime.saved_experts": 5,
    "deepspeed.runtime.saved_folding": 5,
    "deepspeed.runtime.sharding": 5,
    "deepspeed.runtime.sparse_gradients": 5,
    "deepspeed.runtime.activation_checkpointing": 5,
    "deepspeed.runtime.data_pipeline": 5,
    "deepspeed.runtime.domino": 5,
    "deepspeed.runtime.model_checkpointing": 5,
    "deepspeed.runtime.rollout": 5,
    "deepspeed.runtime.sequence_parallel": 5,
    "deepspeed.sequence": 5,
    "deepspeed.runtime.superoffload": 5,
    "deepspeed.runtime.swap_tensor": 5,
    "deepspeed.runtime.tensor_parallel": 5,
    "deepspeed.runtime.zenflow": 5,
    "deepspeed.linear": 5,
    "deepspeed.io": 5,
    "deepspeed.module_inject": 5,
    "deepspeed.moe": 5,
    "deepspeed.monitor": 5,
    "deepspeed.profiling.flops_profiler": 5,
    # L4: the training state as a whole
    "deepspeed.runtime.zero": 4,
    "deepspeed.runtime.base_optimizer": 4,
    "deepspeed.runtime.bf16_optimizer": 4,
    "deepspeed.runtime.fp16": 4,
    "deepspeed.runtime.dataloader": 4,
    "deepspeed.runtime.eigenvalue": 4,
    "deepspeed.runtime.lr_schedules": 4,
    "deepspeed.runtime.lr_schedule_options": 4,
    "deepspeed.runtime.progressive_layer_drop": 4,
    "deepspeed.runtime.sparse_tensor": 4,
    "deepspeed.runtime.comm": 4,
    "deepspeed.runtime.compiler": 4,
    "deepspeed.runtime.norms": 4,
    "deepspeed.runtime.utils": 4,
    "deepspeed.checkpoint": 4,
    "deepspeed.utils.tensor_fragment": 4,
    "deepspeed.utils.mixed_precision_linkage": 4,
    "deepspeed.utils.zero_to_fp32": 4,
    # L3: one group of params, one step rule
    "deepspeed.runtime.zero.buckets": 3,
    "deepspeed.runtime.zero.codec": 3,
    "deepspeed.runtime.zero.shard_group": 3,
    "deepspeed.runtime.zero.quantized_sum": 3,
    "deepspeed.runtime.zero.second_copy": 3,
    "deepspeed.runtime.zero.slice_forms": 3,
    "deepspeed.runtime.zero.spill": 3,
    "deepspeed.runtime.zero.own_slice": 3,
    "deepspeed.runtime.zero.sharded_param": 3,
    "deepspeed.runtime.zero.reducer": 3,
    "deepspeed.runtime.precision": 3,
    "deepspeed.runtime.fp16.loss_scaler": 3,
    "deepspeed.ops": 3,
    # L2: bytes, integers, wires
    "deepspeed.runtime.zero.blocks": 2,
    "deepspeed.runtime.zero.host_copies": 2,
    "deepspeed.runtime.zero.layout": 2,
    "deepspeed.runtime.zero.plan": 2,
    "deepspeed.runtime.zero.slab": 2,
    "deepspeed.runtime.zero.tiers": 2,
    "deepspeed.checkpoint.format": 2,
    "deepspeed.checkpoint.atomic": 2,
    "deepspeed.checkpoint.crew": 2,
    "deepspeed.checkpoint.leftovers": 2,
    "deepspeed.checkpoint.digest": 2,
    "deepspeed.comm": 2,
    "deepspeed.ops.abi": 2,
    "deepspeed.ops.aio": 2,
    "deepspeed.ops.cuda*": 2,
    "deepspeed.ops.group_codes": 2,
    "deepspeed.ops.packing": 2,
    "deepspeed.ops.pages": 2,
    "deepspeed.ops.random_bits": 2,
    "deepspeed.ops.registry": 2,
    "deepspeed.ops.small_floats": 2,
    "deepspeed.ops.native": 2,
    "deepspeed.runtime.zero.estimate": 2,
    "deepspeed.utils.groups": 2,
    "deepspeed.utils.pin_memory": 2,
    # L1: the machine, and what was asked for
    "deepspeed.accelerator": 1,
    "deepspeed.elasticity.elasticity": 1,  # arithmetic on batch sizes, which the configuration is checked by
    "deepspeed.runtime.config*": 1,
    "deepspeed.runtime.constants": 1,
    "deepspeed.runtime.precision_config": 1,
    "deepspeed.runtime.swap_tensor.aio_config": 1,
    "deepspeed.runtime.torch_autocast": 1,
    "deepspeed.runtime.zenflow.zenflow_config": 1,
    "deepspeed.runtime.zero.leaf_module_config": 1,
    "deepspeed.runtime.zero.offload_config": 1,
    "deepspeed.utils.config": 1,
    "deepspeed.inference.v2.config_v2": 1,
    # L0: ground
    "deepspeed.constants": 0,
    "deepspeed.runtime": 0,  # an empty door, as are the folders that hold one section's config.py
    "deepspeed.git_version_info": 0,
    "deepspeed.utils": 0,
    "deepspeed.utils.nvtx": 1,
}

# rows that hold for that one module and not for what lies below it
EXACT = frozenset({"deepspeed", "deepspeed.runtime"})


# folders that hold nothing but the config.py of their section so far
SECTION_FOLDERS = frozenset(
    f"deepspeed.{name}"
    for name in (
        "autotuning",
        "compile",
        "inference",
        "inference.v2",
        "nebula",
        "profiling",
        "runtime.activation_checkpointing",
        "runtime.data_pipeline",
        "runtime.model_checkpointing",
        "runtime.swap_tensor",
        "runtime.tensor_parallel",
        "runtime.zenflow",
    )
)


def layer_of(module: str) -> int | None:
    """Layer of a dotted module name by its longest matching row, or None where no row covers it."""
    if module.endswith(".config") or module in SECTION_FOLDERS:
        return 1  # each section's pydantic model stands beside what it configures
    best = None
    for row, layer in LAYERS.items():
        exact = row == module
        below = row not in EXACT and module.startswith(row + ".")
        starred = row.endswith("*") and module.startswith(row[:-1])
        if (exact or below or starred) and (best is None or len(row) > best[0]):
            best = (len(row), layer)
    return best[1] if best else None


# rows whose modules come with later work
PLANNED = frozenset(
    {
        "deepspeed.compression",
        "deepspeed.runtime.hybrid_engine",
    }
)

# modules of plain integers and names: neither torch nor anything of ours
PURE = (
    "deepspeed.runtime.zero.layout",
    "deepspeed.runtime.zero.plan",
    "deepspeed.checkpoint.format",
)
