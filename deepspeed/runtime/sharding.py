# SPDX-License-Identifier: Apache-2.0
"""Stage 3 and files on disk, set up for an engine: parameters cut and hooked, folders for what NVMe holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.ops.aio.library import Options
from deepspeed.utils import groups
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

from .zero.codec import GroupCodec, schemes_of_weights
from .zero.optimizer import expert_group_name
from .zero.plan import Placement, TierKind
from .zero.residency import Residency, ResidencyPolicy
from .zero.sharded_param import is_zero_param, recode, release, shard_param, spill
from .zero.spill import SpillFolder
from .zero.tiers import tier_for


def spill_folder(config: Any, section: Any, *names: str) -> SpillFolder:
    """The folder of this rank for state that an `offload_*` section sends to NVMe.

    Raises:
        DeepSpeedConfigError: without `nvme_path`.
        OSError: for a folder that cannot be used.
    """
    if section.nvme_path is None:
        raise DeepSpeedConfigError(
            explain(
                "offloading to NVMe needs a folder",
                got='"device": "nvme" without "nvme_path"',
                expected="a folder on the disk to use",
                fix='add "nvme_path" to the same section',
            )
        )
    aio = config.aio_config
    options = Options(
        block_size=aio["block_size"],
        queue_depth=aio["queue_depth"],
        single_submit=aio["single_submit"],
        overlap_events=aio["overlap_events"],
        intra_op_parallelism=aio["intra_op_parallelism"],
    )
    rank = groups.current_mesh().world.rank
    return SpillFolder(Path(section.nvme_path).joinpath(*names, f"rank{rank}"), options)


def shard_params(engine: Any) -> Residency | None:
    """At stage 3, cut the module's parameters over the ranks and place the hooks that gather them."""
    if engine.plan.params is not Placement.SHARDED:
        return None
    zero = engine._config.zero_config
    apply_zero_leaf_module_config(engine.module, zero.leaf_module)
    tier = tier_for(
        engine.device, engine.plan.param_tier is not TierKind.DEVICE, engine.plan.pin_memory
    )
    folder = None
    if engine.plan.param_tier is TierKind.FILE:
        kind = str(engine.get_data_types()[0]).removeprefix("torch.")
        folder = spill_folder(engine._config, zero.offload_param, "zero_stage_3", f"{kind}params")
    schemes = schemes_of_weights(engine.module, _section(engine._config.weight_quantization_config))
    for param in engine.module.parameters():
        name = expert_group_name(param)
        axis = engine.mesh.sequence_data if name is None else engine.mesh.expert_data[name]
        scheme = schemes.get(param)
        if not is_zero_param(param):
            codec = None if scheme is None else GroupCodec.of(scheme, param)
            shard_param(param, axis, engine.device, tier, folder, codec)
        else:
            if scheme is not None:
                recode(param, tier, GroupCodec.of(scheme, param))
            if folder is not None and param.ds_spill is None:
                spill(param, folder, param.ds_tensor)
        param.ds_enable_sanity_checks = zero.enable_sanity_checks
    release(engine.module.parameters())
    policy = ResidencyPolicy(
        prefetch_numel=1 if zero.allgather_sequential else int(zero.prefetch_bucket_size),
        max_live_numel=int(zero.max_live_parameters),
        max_reuse_distance=int(zero.max_reuse_distance),
        persist_numel=int(zero.param_persistence_threshold),
        model_persist_numel=int(zero.model_persistence_threshold),
    )
    return Residency(engine.module, policy)


def _section(section: Any) -> dict[str, Any] | None:
    return None if section is None else section.model_dump()
