# SPDX-License-Identifier: Apache-2.0
"""Which rank saves what in which file: the engine's side of `save_checkpoint`.

How files are written so that none is lost is `checkpoint.atomic`; what a load takes over is `engine_load`.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import format as names
from ..checkpoint import model_states, random_states, stacked_experts
from ..checkpoint.atomic import Crew, Publication, checked_tag, disk, replace_file
from ..checkpoint.format import Model, Optim, Zero
from ..checkpoint.writer import plain, save_file, warn_of_objects
from ..git_version_info import version
from ..utils.errors import explain
from ..utils.logging import logger
from . import saved_experts, saved_folding
from .zero import state as zero_state
from .zero.optimizer import ZeroOptimizer
from .zero.own_slice import is_zero_param, shape_of, values_of_slice
from .zero.partition_parameters import GatheredParameters

GRAD_SCALER = "grad_scaler"
"""Ours: state of torch's scaler where fp16 autocast runs without a wrapper."""

# - ranks


def crew_of(engine: Any) -> Crew:
    """The processes of an engine, as a save sees them."""
    world = engine.mesh.world
    leads = engine.local_rank == 0 if _uses_node_storage(engine) else world.rank == 0

    def exchange(item: object) -> list[object]:
        if world.size == 1:
            return [item]
        told: list[object] = [None] * world.size
        torch.distributed.all_gather_object(told, item, group=world.group)
        return told

    return Crew(world.rank, world.size, leads, exchange)


def _uses_node_storage(engine: Any) -> bool:
    return bool(engine._config.use_node_local_storage)


def mp_rank_of(engine: Any) -> int:
    return engine.mesh.tensor.rank


def slices_of(engine: Any) -> tuple[int, int]:
    """This rank among those that cut single parameters, and how many these are: not the stages of a pipeline."""
    if hasattr(engine.mpu, "get_slice_parallel_rank"):
        return engine.mpu.get_slice_parallel_rank(), engine.mpu.get_slice_parallel_world_size()
    return engine.mesh.tensor.rank, engine.mesh.tensor.size


def _writes_model(engine: Any) -> bool:
    if has_slices(engine):
        return _writes_shard(engine)
    rank = engine.mesh.sequence_data.rank
    if _uses_node_storage(engine):
        # of each machine one, and those that write with it
        return engine.local_rank == 0 or (
            rank > 0 and engine.checkpoint_engine.is_data_parallel_writer(rank)
        )
    return engine.checkpoint_engine.is_data_parallel_writer(rank)


def _writes_shard(engine: Any) -> bool:
    """Whether this rank saves its shard: of ranks with equal shards (MiCS) one does, on each machine that needs it."""
    shard, replica = engine.mesh.state_axes
    return replica.rank == 0 or (_uses_node_storage(engine) and engine.local_rank < shard.size)


def _shard_rank(engine: Any) -> int:
    """The number of this rank's shard in file names."""
    return engine.mesh.state_axes[0].rank


def has_shards(engine: Any) -> bool:
    return isinstance(engine.optimizer, ZeroOptimizer) and engine.plan.stage > 0


def has_slices(engine: Any) -> bool:
    """Whether the module's parameters are sharded (stage 3)."""
    return getattr(engine, "residency", None) is not None


# - saving


def save_checkpoint(
    engine: Any,
    save_dir: Any,
    tag: Any,
    client_state: Mapping[str, Any],
    save_latest: bool,
    exclude_frozen_parameters: bool,
) -> bool:
    """Save an engine collectively; see `DeepSpeedEngine.save_checkpoint`.

    Raises:
        ValueError: no save folder, or a tag that cannot name a folder in it.
        KeyError: `client_state` uses a reserved key.
        DeepSpeedCheckpointError: another rank failed; nothing was published.
    """
    if save_dir is None or str(save_dir) == "":
        raise ValueError(
            explain(
                "save_checkpoint needs a folder",
                got=repr(save_dir),
                expected="save_dir, the path of a folder",
            )
        )
    keeper = engine.checkpoint_engine
    keeper.finish()
    if isinstance(engine.optimizer, ZeroOptimizer):
        engine.optimizer.order.settle()
    crew = crew_of(engine)
    tag = _common_tag(engine, crew, f"global_step{engine.global_steps}" if tag is None else tag)
    files: dict[str, Any] = {}
    random = crew.together(random_states.capture)
    crew.together(
        lambda: files.update(
            _files_of_rank(engine, client_state, exclude_frozen_parameters, random)
        )
    )
    folder = Path(save_dir)
    publication = Publication(folder, tag, crew, names.LATEST if save_latest else None)
    keeper.store(publication, files, engine.checkpoint_serialization_enabled())
    if has_shards(engine):
        crew.together(
            lambda: copy_export_script(folder) if crew.leads and folder.is_dir() else None
        )
    return True


def copy_export_script(folder: Path) -> None:
    """Put the stand-alone exporter beside the tags."""
    source = Path(__file__).parent.parent / "utils" / names.EXPORT_SCRIPT
    target = folder / names.EXPORT_SCRIPT
    content = source.read_bytes()
    if target.is_file() and target.read_bytes() == content:
        return
    replace_file(target, content, flush=False)
    make_executable(target)


def make_executable(path: Path) -> None:
    """Let everybody run a file, where the file system has permissions at all."""
    if os.name == "nt":
        return
    try:
        path.chmod(0o755)
    except OSError as error:  # network shares without permissions
        logger.info(f"{path} stays as it is, run it by python: {error}")


def _common_tag(engine: Any, crew: Crew, tag: Any) -> str:
    """The tag that all ranks save under."""
    tags = crew.together(lambda: checked_tag(tag))
    if len(set(tags)) > 1 and engine.checkpoint_tag_validation_enabled():
        text = explain(
            "ranks were given different checkpoint tags",
            got=", ".join(f"rank {rank}: {given!r}" for rank, given in enumerate(tags)),
            expected="the same tag on every rank",
            fix="A tag that differs, such as a loss or a time, must be broadcast first.",
        )
        if engine.checkpoint_tag_validation_fail():
            raise AssertionError(text)
        logger.warning(f"{text} Saving under the tag of rank 0.")
    return tags[0]


def _check_client_state(engine: Any, client_state: Mapping[str, Any]) -> None:
    reserved = (
        names.RESERVED_CLIENT_KEYS_MOE if engine.has_moe_layers else names.RESERVED_CLIENT_KEYS
    )
    if taken := sorted(reserved & set(client_state)):
        raise KeyError(
            explain("client_state uses reserved keys", got=", ".join(taken), fix="Rename them.")
        )
    warn_of_objects(client_state, "client_state")


def _files_of_rank(
    engine: Any, client_state: Mapping[str, Any], exclude_frozen: bool, random: list[Any]
) -> OrderedDict[str, dict[str, Any]]:
    """The files that this rank writes, with their content."""
    _check_client_state(engine, client_state)
    if engine.plan.stage == 3 and engine.zero_elastic_checkpoint():
        raise NotImplementedError(
            explain(
                "stage 3 has no elastic form of checkpoints",
                got="zero_optimization.elastic_checkpoint",
                fix="remove the key: every checkpoint loads on any number of ranks",
            )
        )
    files: OrderedDict[str, dict[str, Any]] = OrderedDict()
    mp_rank = mp_rank_of(engine)
    if has_slices(engine):
        _refuse_packed(engine)
        engine.residency.release_all()
    weights, writes = None, _writes_model(engine)
    if engine.has_moe_layers:
        weights = _add_experts(engine, files, exclude_frozen)
    elif writes:
        weights = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    if writes:
        model = _model_content(engine, weights, exclude_frozen)
        model.update(client_state)
        if not has_slices(engine) or _shard_rank(engine) == 0:  # a load looks nowhere else
            model[Model.RANDOM_STATES] = random
        by_rank = names.zero3_model_file(_shard_rank(engine), mp_rank)
        files[by_rank if has_slices(engine) else names.model_file(mp_rank)] = model
    if engine.pipeline_parallelism:
        files.update(engine.layer_files(exclude_frozen))
    if has_shards(engine) and _writes_shard(engine):
        name = names.optim_file(_shard_rank(engine), mp_rank, bf16=engine.bfloat16_enabled())
        files[name] = {
            Optim.STATE: engine.optimizer.state_dict(),
            Optim.DS_CONFIG: plain(_raw_config(engine)),
            Optim.DS_VERSION: version,
        }
    saved_folding.note(engine, files)
    return files


def _raw_config(engine: Any) -> Any:
    return getattr(engine._config, "_param_dict", None) or engine.config


def _model_content(
    engine: Any, weights: Mapping[str, Any] | None, exclude_frozen: bool
) -> dict[str, Any]:
    module, sharded = engine.module, has_shards(engine)
    frozen = None
    if sharded and engine.plan.stage >= 2 and not exclude_frozen:
        frozen = model_states.frozen_params(module)
    scheduler = (
        engine.lr_scheduler.state_dict() if hasattr(engine.lr_scheduler, "state_dict") else None
    )
    warn_of_objects(scheduler, "the scheduler's state")
    content = {
        Model.MODULE: weights,
        Model.BUFFER_NAMES: model_states.buffer_names(module),
        Model.OPTIMIZER: None,
        Model.PARAM_SHAPES: zero_state.param_shapes(engine.optimizer) if sharded else None,
        Model.FROZEN_PARAM_SHAPES: frozen
        and OrderedDict((n, shape_of(p)) for n, p in frozen.items()),
        Model.SHARED_PARAMS: model_states.shared_names(module) if sharded else None,
        Model.FROZEN_PARAM_FRAGMENTS: frozen
        and OrderedDict((n, _fragment(p)) for n, p in frozen.items()),
        Model.LR_SCHEDULER: scheduler,
        Model.DATA_SAMPLER: _state_of(getattr(engine.training_dataloader, "data_sampler", None)),
        Model.LOADER_POSITION: _loader_position(engine.training_dataloader),
        Model.RANDOM_LTD: _state_of(engine.random_ltd_scheduler),
        Model.SPARSE_MODULES: set(engine.sparse_tensor_module_names),
        Model.SKIPPED_STEPS: engine.skipped_steps,
        Model.GLOBAL_STEPS: engine.global_steps,
        Model.GLOBAL_SAMPLES: engine.global_samples,
        Model.DP_WORLD_SIZE: engine.seq_dp_world_size,
        Model.MP_WORLD_SIZE: engine.mp_world_size,
        **_parallel_dimensions(engine),
        Model.DS_CONFIG: plain(_raw_config(engine)),
        Model.DS_VERSION: version,
    }
    if (info := getattr(module, Model.UNIVERSAL_INFO, None)) is not None:
        content[Model.UNIVERSAL_INFO] = info
    if engine.has_moe_layers:
        content[Model.NUM_EXPERTS] = list(engine.num_experts)
        content[Model.AUTOEP_LAYERS] = saved_experts.entries_of(engine)
        if not sharded:  # it has a file of its own
            content.pop(Model.OPTIMIZER)
    elif not sharded:
        content[Model.OPTIMIZER] = _inline_optimizer(engine)
    if (scaler := getattr(engine.driver, "scaler", None)) is not None:
        content[GRAD_SCALER] = scaler.state_dict()
    return content


def _parallel_dimensions(engine: Any) -> dict[str, Any]:
    if hasattr(
        engine.mpu, "get_model_parallel_world_size"
    ):  # its model ranks may be a pipeline's too
        return parallel_metadata(engine.mpu)
    return _degrees(engine.mesh.pipe.size, engine.mesh.tensor.size)


def parallel_metadata(mpu: Any) -> dict[str, Any]:
    """What model states say of the degrees of model parallelism: an mpu's."""
    of_slice = getattr(mpu, "get_slice_parallel_world_size", None)
    tensor = of_slice or mpu.get_model_parallel_world_size
    stages = getattr(mpu, "get_pipe_parallel_world_size", None)
    return _degrees(1 if stages is None else stages(), tensor())


def _degrees(pipe: int, tensor: int) -> dict[str, Any]:
    return {Model.PARALLEL_DIMENSIONS: {"pp_degree": pipe, "tp_degree": tensor}}


def _fragment(param: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a frozen parameter: all of it, or its slice."""
    return (values_of_slice(param) if is_zero_param(param) else param).detach().cpu()


def _refuse_packed(engine: Any) -> None:
    if any(getattr(p, "ds_codec", None) is not None for p in engine.module.parameters()):
        raise NotImplementedError(
            explain(
                "a module with quantized weights cannot be saved",
                got="weight_quantization in the configuration",
                expected="weights in a floating dtype",
                fix="save from a run without it; quantize when serving",
            )
        )


def _state_of(owner: Any) -> Any:
    return owner.state_dict() if hasattr(owner, "state_dict") else None


def _loader_position(loader: Any) -> Any:
    """Where the training loader stands; None where its sampler keeps that itself."""
    return None if keeps_position(loader) else _state_of(loader)


def keeps_position(loader: Any) -> bool:
    """Whether a loader's sampler has a state of its own."""
    return hasattr(getattr(loader, "data_sampler", None), "load_state_dict")


def _inline_optimizer(engine: Any) -> dict[str, Any] | None:
    if engine.optimizer is None:
        return None
    saved = dict(engine.optimizer.state_dict())
    saved.setdefault(Zero.WRAPPER_NAMES, optimizer_names(engine))
    return saved


def optimizer_names(engine: Any) -> list[list[str]]:
    """Parameter names of each of the optimizer's groups, in the order of saved states."""
    optimizer = engine.optimizer
    if isinstance(optimizer, ZeroOptimizer):
        return [list(group) for group in zero_state.param_shapes(optimizer)]
    return [[engine.param_names[p] for p in group["params"]] for group in optimizer.param_groups]


def _add_experts(
    engine: Any, files: dict[str, dict[str, Any]], exclude_frozen: bool
) -> Mapping[str, Any]:
    """Give every expert of this rank its own file, and the optimizer too where it is not sharded.

    Of the ranks with the same experts the first writes. Returns the other weights; at stage 3 all, as slices are in the
    optimizer's files.
    """
    if has_slices(engine):
        _refuse_spread_slices(engine)
        return engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    state = engine.module_state_dict(exclude_frozen_parameters=exclude_frozen)
    mp_rank, prefixes = mp_rank_of(engine), model_states.moe_prefixes(engine.module)
    rest, experts = model_states.split_experts(state, prefixes, first_expert(engine))
    rest, stacked = stacked_experts.split_stacks(rest, prefixes, first_expert(engine))
    experts.update(stacked)
    for (layer, expert), part in experts.items():
        if saved_folding.writes_experts(engine, expert_data_axis(engine, prefixes[layer])):
            files[names.expert_file(layer, expert, mp_rank)] = part
    widest = max(engine.mesh.expert_data.values(), key=lambda axis: -axis.size, default=None)
    writes = saved_folding.writes_experts(engine, widest or engine.mesh.sequence_data)
    if not has_shards(engine) and writes and engine.optimizer is not None:
        name = names.expert_optim_file(expert_rank(engine), mp_rank)
        files[name] = {Model.OPTIMIZER: _inline_optimizer(engine)}
    return rest


def _refuse_spread_slices(engine: Any) -> None:
    if saved_experts.spread_layers(engine.module):
        saved_experts.refuse_frozen_slices(engine)
    elif engine.mesh.spreads_experts:
        raise NotImplementedError(
            explain(
                "experts spread over ranks cannot be saved at ZeRO stage 3",
                got=", ".join(name for name, axis in engine.mesh.expert.items() if axis.size > 1),
                fix="set zero_optimization.stage to 2, or ep_size to 1",
            )
        )


def expert_rank(engine: Any) -> int:
    """This rank's number among those that share the most widely spread experts."""
    axis = max(engine.mesh.expert.values(), key=lambda axis: axis.size, default=None)
    return 0 if axis is None else axis.rank


def expert_data_axis(engine: Any, layer: str) -> Any:
    """The ranks that hold the same experts of a layer."""
    name = engine.module.get_submodule(layer).expert_group_name
    return engine.mesh.expert_data.get(name, engine.mesh.sequence_data)


def first_expert(engine: Any) -> Callable[[str], int]:
    """Gives the global number of a layer's first local expert."""

    def first(layer: str) -> int:
        module = engine.module.get_submodule(layer)
        axis = engine.mesh.expert.get(module.expert_group_name)
        return 0 if axis is None else axis.rank * module.num_local_experts

    return first


# - weights alone


def module_state_dict(
    engine: Any,
    destination: Any = None,
    prefix: str = "",
    keep_vars: bool = False,
    exclude_frozen_parameters: bool = False,
) -> dict[str, Any]:
    """The module's state dict, without frozen parameters if asked."""
    options: dict[str, Any] = {"prefix": prefix, "keep_vars": keep_vars}
    if destination is not None:
        options["destination"] = destination
    return model_states.module_state(engine.module, exclude_frozen_parameters, **options)


def save_16bit_model(
    engine: Any, save_dir: Any, save_filename: str, exclude_frozen_parameters: bool = False
) -> bool:
    """Save the module's weights as one file, collectively; see `DeepSpeedEngine.save_16bit_model`."""
    if has_slices(engine) and not engine.zero_gather_16bit_weights_on_model_save():
        logger.warning(
            "save_16bit_model wrote nothing: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
        )
        return False
    crew = crew_of(engine)
    state = consolidated_16bit_state_dict(engine, exclude_frozen_parameters)

    def write() -> None:
        if state is None:
            return
        path = Path(save_dir) / save_filename
        disk.make_folder(path.parent)
        temporary = path.with_name(path.name + names.PARTIAL_SUFFIX)
        try:
            save_file(temporary, state)
            disk.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    crew.together(write)
    return True


def consolidated_16bit_state_dict(
    engine: Any, exclude_frozen_parameters: bool = False
) -> dict[str, Any] | None:
    """The whole module's weights in host memory on rank 0, None on the others; a collective where they are divided."""
    # here, as few engines have layers that are divided
    from ..module_inject.tp_layer import GatherReplacedLayerParams

    engine._raise_if_autoep_zero3_consolidated_export("a consolidated state dict")
    leads = engine.mesh.world.rank == 0
    whole: dict[torch.nn.Parameter, torch.Tensor] = {}
    for param in engine.module.parameters():
        if exclude_frozen_parameters and not param.requires_grad:
            continue
        if not (has_slices(engine) or hasattr(param, "gather_params")):  # of tensor-parallel ranks
            continue
        with GatheredParameters(param), GatherReplacedLayerParams(param):
            if leads:
                whole[param] = param.detach().cpu().clone()
    if not leads:
        return saved_experts.as_the_model_had_them(engine, None)
    params = dict(engine.module.named_parameters(remove_duplicate=False))
    state = module_state_dict(engine, exclude_frozen_parameters=exclude_frozen_parameters)
    here = OrderedDict(
        (name, whole[params[name]] if params.get(name) in whole else value.detach().cpu())
        for name, value in state.items()
    )
    return saved_experts.as_the_model_had_them(engine, here)
