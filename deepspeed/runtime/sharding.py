# SPDX-License-Identifier: Apache-2.0
"""Stage 3 and files on disk, set up for an engine: parameters cut and hooked, folders for what NVMe holds."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.ops.group_quant import GroupScheme
from deepspeed.utils import env, groups
from deepspeed.utils.errors import DeepSpeedConfigError, explain
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

from .zero.codec import GroupCodec, schemes_of_weights
from .zero.optimizer import expert_group_name
from .zero.own_slice import is_zero_param, spill, unspill
from .zero.plan import Placement, TierKind
from .zero.residency import Residency, ResidencyPolicy
from .zero.sharded_param import release, shard_param
from .zero.slice_forms import keep_quantized, keep_second, move_to_axis, recode, send_quantized
from .zero.spill import SpillFolder, open_folder, together
from .zero.tiers import Tier, tier_for


def zero_axes(mesh: Mesh, zero: Any) -> Mesh:
    """Add to a mesh the smaller axes that MiCS, hpZ and quantized gradients of stage 3 work over; a collective.

    Args:
        mesh: the ranks.
        zero: section `zero_optimization`, parsed.

    Raises:
        DeepSpeedConfigError: a size that does not divide the data-parallel ranks, or both of MiCS and hpZ.
    """
    if int(zero.stage) != 3:
        return mesh
    mics, second = int(zero.mics_shard_size), int(zero.zero_hpz_partition_size)
    if mics > 0 and second > 1:
        raise DeepSpeedConfigError(
            explain(
                "MiCS and hpZ exclude each other: MiCS has no copy of the params beyond its group",
                got=f"mics_shard_size {mics} and zero_hpz_partition_size {second}",
                fix="remove one of the two keys",
            )
        )
    data = mesh.sequence_data
    for key, size in (("mics_shard_size", mics), ("zero_hpz_partition_size", second)):
        if size > 0 and data.size % size:
            raise DeepSpeedConfigError(
                explain(
                    f"'zero_optimization.{key}' does not divide the data-parallel ranks",
                    got=size,
                    expected=f"a divisor of {data.size}",
                    fix=f"change {key} or the number of processes",
                )
            )
    if mics == 1 < data.size:
        raise DeepSpeedConfigError(
            explain(
                "MiCS groups of one rank share nothing",
                got="mics_shard_size 1",
                expected="2 or more",
                fix="set zero_optimization.stage to 0 or 1 for weights that are whole on every rank",
            )
        )
    if mics > 0:
        shard, replica = data.split(mics, mesh.world)
        mesh = replace(mesh, shard=_in_hops(shard, mesh.world, zero), replica=replica)
    else:
        mesh = replace(mesh, sequence_data=_in_hops(data, mesh.world, zero))
    if 1 < second < data.size:
        mesh = replace(mesh, second=data.split(second, mesh.world)[0])
    if second > 1 and data.size == mesh.world.size:
        groups._create_zero_param_parallel_group(second)  # for the getters of old names
    return mesh


def _in_hops(axis: Axis, world: Axis, zero: Any) -> Axis:
    """The same axis, told which of its ranks are on this machine, where collectives are to go in two hops."""
    here = env.LOCAL_SIZE.get() or 0
    wanted = zero.zero_quantized_gradients or zero.mics_hierarchical_params_gather
    if not wanted or not 1 < here < axis.size or axis.size % here:
        return axis
    return replace(axis, hops=axis.split(here, world))


def spill_folder(config: Any, section: Any, *names: str) -> SpillFolder:
    """The folder of this rank for state that an `offload_*` section sends to NVMe.

    Raises:
        DeepSpeedConfigError: without `nvme_path`.
        OSError: for a folder that cannot be used.
    """
    world = groups.current_mesh().world
    return open_folder(section.nvme_path, names, config.aio_config, world)


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
        with nullcontext() if folder is None else together(engine.mesh.world, "write its params"):
            _shard_one(engine, param, tier, folder, schemes.get(param))
    release(engine.module.parameters())
    policy = ResidencyPolicy(
        prefetch_numel=1 if zero.allgather_sequential else int(zero.prefetch_bucket_size),
        max_live_numel=int(zero.max_live_parameters),
        max_reuse_distance=int(zero.max_reuse_distance),
        persist_numel=int(zero.param_persistence_threshold),
        model_persist_numel=int(zero.model_persistence_threshold),
    )
    return Residency(engine.module, policy)


def _shard_one(
    engine: Any,
    param: Any,
    tier: Tier,
    folder: SpillFolder | None,
    scheme: GroupScheme | None,
) -> None:
    """Cut one parameter, or have one that is cut lie where the configuration wants it."""
    zero = engine._config.zero_config
    axis, home = _axes_of(engine.mesh, param)
    if not is_zero_param(param):
        codec = None if scheme is None else GroupCodec.of(scheme, param)
        shard_param(param, axis, engine.device, tier, folder, codec, home)
    else:
        move_to_axis(param, axis, home, tier, folder)
        if scheme is not None:
            recode(param, tier, GroupCodec.of(scheme, param))
        if folder is not None and param.ds_spill is None:
            spill(param, folder, param.ds_tensor)
        elif folder is None and param.ds_spill is not None:
            unspill(param, tier)
    param.ds_enable_sanity_checks = zero.enable_sanity_checks
    if zero.zero_quantized_weights:
        send_quantized(param)
    if zero.zero_quantized_nontrainable_weights and not param.requires_grad:
        keep_quantized(param, tier)
    if engine.mesh.second is not None and axis == engine.mesh.sequence_data:
        keep_second(param, engine.mesh.second)


def _axes_of(mesh: Mesh, param: Any) -> tuple[Axis, Axis]:
    """The ranks that a parameter is cut over, and all that have it."""
    name = expert_group_name(param)
    if name is not None and mesh.shard is not None:
        raise DeepSpeedConfigError(
            explain(
                "MiCS does not know experts, whose ranks are groups of their own",
                got="'mics_shard_size' and a model with expert-parallel layers",
                fix="remove mics_shard_size, or use stage 1 or 2",
            )
        )
    if name is not None:
        return mesh.expert_data[name], mesh.expert_data[name]
    return mesh.state_axes[0], mesh.sequence_data


def _section(section: Any) -> dict[str, Any] | None:
    return None if section is None else section.model_dump()
