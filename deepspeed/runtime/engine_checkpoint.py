# SPDX-License-Identifier: Apache-2.0
"""Which rank saves what in which file, and what a load takes over: the engine's checkpoint policies.

How files are written so that none is lost is `checkpoint.atomic`; how they are read so that none does harm is
`checkpoint.reader`; how a state of another number of ranks or another stage is read is `checkpoint.reshard`.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import format as names
from ..checkpoint import model_states
from ..checkpoint.atomic import Crew, Entry, checked_tag, disk, publish, replace_file, resolve
from ..checkpoint.format import Model, Optim, Zero
from ..checkpoint.reader import Folder, own_memory, read_tag
from ..checkpoint.reshard import SavedState, from_inline, from_shards
from ..checkpoint.writer import plain, save_file, tensor_bytes, warn_of_objects
from ..git_version_info import version
from ..utils.env import DS_VERIFY_CHECKPOINTS
from ..utils.errors import DeepSpeedCheckpointError, explain
from ..utils.logging import logger
from .zero import state as zero_state
from .zero.optimizer import ZeroOptimizer

_GRAD_SCALER = "grad_scaler"
"""Ours: state of torch's scaler where fp16 autocast runs without a wrapper."""

_OLDEST_STAGE1 = (0, 3, 17)


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


def _mp_rank(engine: Any) -> int:
    return engine.mesh.tensor.rank


def _writes_model(engine: Any) -> bool:
    if _uses_node_storage(engine):
        return engine.local_rank == 0
    return engine.mesh.sequence_data.rank == 0


def _has_shards(engine: Any) -> bool:
    return isinstance(engine.optimizer, ZeroOptimizer) and engine.plan.stage > 0


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
            explain("save_checkpoint needs a folder", got=repr(save_dir), expected="save_dir, the path of a folder")
        )
    crew = crew_of(engine)
    tag = _common_tag(engine, crew, f"global_step{engine.global_steps}" if tag is None else tag)
    files: dict[str, Any] = {}
    crew.together(
        lambda: files.update(_files_of_rank(engine, client_state, exclude_frozen_parameters))
    )
    as_zip = engine.checkpoint_serialization_enabled()

    def write(folder: Path) -> list[Entry]:
        return [save_file(folder / name, content, as_zip=as_zip) for name, content in files.items()]

    folder = Path(save_dir)
    needed = sum(map(tensor_bytes, files.values()))
    publish(folder, tag, crew, write, needed=needed, latest=names.LATEST if save_latest else None)
    if _has_shards(engine):
        crew.together(lambda: copy_export_script(folder) if crew.leads else None)
    return True


def copy_export_script(folder: Path) -> None:
    """Put the stand-alone exporter beside the tags."""
    source = Path(__file__).parent.parent / "utils" / names.EXPORT_SCRIPT
    target = folder / names.EXPORT_SCRIPT
    replace_file(target, source.read_bytes())
    if os.name != "nt":
        target.chmod(0o755)


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
    reserved = names.RESERVED_CLIENT_KEYS_MOE if engine.has_moe_layers else names.RESERVED_CLIENT_KEYS
    if taken := sorted(reserved & set(client_state)):
        raise KeyError(explain("client_state uses reserved keys", got=", ".join(taken), fix="Rename them."))
    warn_of_objects(client_state, "client_state")


def _files_of_rank(
    engine: Any, client_state: Mapping[str, Any], exclude_frozen: bool
) -> OrderedDict[str, dict[str, Any]]:
    """The files that this rank writes, with their content."""
    _check_client_state(engine, client_state)
    files: OrderedDict[str, dict[str, Any]] = OrderedDict()
    mp_rank = _mp_rank(engine)
    if _writes_model(engine):
        model = _model_content(engine, exclude_frozen)
        if engine.has_moe_layers:
            _move_experts_out(engine, model, files)
        model.update(client_state)
        files[names.model_file(mp_rank)] = model
    if _has_shards(engine) and engine.mesh.sequence.rank == 0:
        name = names.optim_file(engine.mesh.data.rank, mp_rank, bf16=engine.bfloat16_enabled())
        files[name] = {
            Optim.STATE: engine.optimizer.state_dict(),
            Optim.DS_CONFIG: plain(_raw_config(engine)),
            Optim.DS_VERSION: version,
        }
    return files


def _raw_config(engine: Any) -> Any:
    return getattr(engine._config, "_param_dict", None) or engine.config


def _model_content(engine: Any, exclude_frozen: bool) -> dict[str, Any]:
    module, sharded = engine.module, _has_shards(engine)
    frozen = None
    if sharded and engine.plan.stage >= 2 and not exclude_frozen:
        frozen = model_states.frozen_params(module)
    scheduler = engine.lr_scheduler.state_dict() if hasattr(engine.lr_scheduler, "state_dict") else None
    warn_of_objects(scheduler, "the scheduler's state")
    content = {
        Model.MODULE: engine.module_state_dict(exclude_frozen_parameters=exclude_frozen),
        Model.BUFFER_NAMES: model_states.buffer_names(module),
        Model.OPTIMIZER: None if sharded else _inline_optimizer(engine),
        Model.PARAM_SHAPES: zero_state.param_shapes(engine.optimizer) if sharded else None,
        Model.FROZEN_PARAM_SHAPES: frozen and OrderedDict((n, p.shape) for n, p in frozen.items()),
        Model.SHARED_PARAMS: model_states.shared_names(module) if sharded else None,
        Model.FROZEN_PARAM_FRAGMENTS: frozen and OrderedDict((n, p.detach().cpu()) for n, p in frozen.items()),
        Model.LR_SCHEDULER: scheduler,
        Model.DATA_SAMPLER: _state_of(getattr(engine.training_dataloader, "data_sampler", None)),
        Model.RANDOM_LTD: _state_of(engine.random_ltd_scheduler),
        Model.SPARSE_MODULES: set(engine.sparse_tensor_module_names),
        Model.SKIPPED_STEPS: engine.skipped_steps,
        Model.GLOBAL_STEPS: engine.global_steps,
        Model.GLOBAL_SAMPLES: engine.global_samples,
        Model.DP_WORLD_SIZE: engine.seq_dp_world_size,
        Model.MP_WORLD_SIZE: engine.mp_world_size,
        Model.PARALLEL_DIMENSIONS: {"pp_degree": engine.mesh.pipe.size, "tp_degree": engine.mesh.tensor.size},
        Model.DS_CONFIG: plain(_raw_config(engine)),
        Model.DS_VERSION: version,
    }
    if (scaler := getattr(engine.driver, "scaler", None)) is not None:
        content[_GRAD_SCALER] = scaler.state_dict()
    return content


def _state_of(owner: Any) -> Any:
    return owner.state_dict() if hasattr(owner, "state_dict") else None


def _inline_optimizer(engine: Any) -> dict[str, Any] | None:
    if engine.optimizer is None:
        return None
    saved = dict(engine.optimizer.state_dict())
    saved.setdefault(Zero.WRAPPER_NAMES, _optimizer_names(engine))
    return saved


def _optimizer_names(engine: Any) -> list[list[str]]:
    """Parameter names of each of the optimizer's groups, in the order of saved states."""
    optimizer = engine.optimizer
    if isinstance(optimizer, ZeroOptimizer):
        return [list(group) for group in zero_state.param_shapes(optimizer)]
    return [[engine.param_names[p] for p in group["params"]] for group in optimizer.param_groups]


def _move_experts_out(engine: Any, model: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Give every expert its own file, and the optimizer too where it is not sharded."""
    prefixes = model_states.moe_prefixes(engine.module)
    rest, experts = model_states.split_experts(model[Model.MODULE], prefixes, _first_expert(engine))
    model[Model.MODULE] = rest
    model[Model.NUM_EXPERTS] = list(engine.num_experts)
    mp_rank = _mp_rank(engine)
    for (layer, expert), part in experts.items():
        files[names.expert_file(layer, expert, mp_rank)] = part
    if not _has_shards(engine):
        files[names.expert_optim_file(0, mp_rank)] = {Model.OPTIMIZER: model.pop(Model.OPTIMIZER)}


def _first_expert(engine: Any) -> Any:
    """Gives the global number of a layer's first local expert; the expert-parallel size is 1."""
    return lambda layer: 0


# - loading


def load_checkpoint(
    engine: Any,
    load_dir: Any,
    tag: Any = None,
    *,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load into an engine collectively; see `DeepSpeedEngine.load_checkpoint`.

    Raises:
        AssertionError: the tag's folder holds no model states, or those of another model-parallel size.
        DeepSpeedCheckpointError: files are damaged, refused, or do not fit; or another rank failed.
    """
    crew, root = crew_of(engine), Path(load_dir)
    folder = crew.together(lambda: _find_tag(root, tag))[crew.rank]
    if folder is None:
        logger.warning(
            f"there is no file '{names.LATEST}' in {root}, so nothing is loaded; to load a certain tag, pass tag=..."
        )
        return None, None
    load = _Load(engine, folder, load_optimizer_states and not load_module_only)
    try:
        crew.together(load.open)
        crew.together(lambda: load.module(load_module_strict, custom_load_fn))
        if load_module_only:
            crew.together(load.masters_from_weights)
            return str(load.model_path), load.client_state({Model.MODULE})
        crew.together(load.optimizer)
        crew.together(lambda: load.counters(load_lr_scheduler_states))
        own = set(names.KEYS_NOT_IN_CLIENT_STATE) | {_GRAD_SCALER}
        own |= {Model.LR_SCHEDULER} if load_lr_scheduler_states else set()
        client_state = load.client_state(own | ({Model.OPTIMIZER} if load_optimizer_states else set()))
        if load_optimizer_states and not _has_shards(engine) and engine.optimizer is not None:
            client_state[Model.OPTIMIZER] = engine.optimizer.state_dict()
        return str(load.model_path), client_state
    finally:
        load.close()


def _find_tag(root: Path, tag: Any) -> Path | None:
    text = read_tag(root, names.LATEST) if tag is None else str(tag)
    return None if text is None else resolve(root, text)


class _Load:
    """One load: opens and checks what this rank needs, then hands it out piece by piece.

    Args:
        engine: receives.
        path: the tag's folder.
        with_states: whether optimizer states are wanted.
    """

    def __init__(self, engine: Any, path: Path, with_states: bool) -> None:
        self.engine, self.path, self.with_states = engine, path, with_states
        self.model: dict[str, Any] = {}
        self.saved: SavedState | None = None

    # - opening

    def open(self) -> None:
        """Read the model states, and the parts of the optimizer that this rank is going to copy."""
        self.folder = Folder(self.path, verify=DS_VERIFY_CHECKPOINTS.get())
        mp_rank = _mp_rank(self.engine)
        choices = (names.model_file(mp_rank), names.zero3_model_file(0, mp_rank))
        self.model_path = self.path / next(filter(self.folder.has, choices), choices[0])
        files = self.folder.glob("mp_rank_*_model_states.pt") or self.folder.glob("zero_pp_rank_0_*_model_states.pt")
        if not files:
            raise AssertionError(
                explain(
                    f"there are no model states in {self.path}",
                    got="a folder without *_model_states.pt" if self.path.is_dir() else "no such folder",
                    expected=choices[0],
                    fix="Check load_dir and tag.",
                )
            )
        self.model = self.folder.load(self.model_path.name)
        self._check_model(len(files))
        if isinstance(self.engine.optimizer, ZeroOptimizer) or self.with_states:
            self.saved = self._open_optimizer()
        if self.saved is not None and isinstance(self.engine.optimizer, ZeroOptimizer):
            zero_state.open_needed(self.engine.optimizer, self.saved)

    def _check_model(self, files: int) -> None:
        if lacking := names.missing_keys(self.model, (Model.MODULE, Model.DP_WORLD_SIZE, Model.MP_WORLD_SIZE)):
            raise DeepSpeedCheckpointError(
                explain(f"{self.model_path} is no file of model states", got=f"no key {', '.join(lacking)}")
            )
        saved_mp = self.model[Model.MP_WORLD_SIZE]
        if not files == saved_mp == self.engine.mp_world_size:
            raise AssertionError(
                explain(
                    "the checkpoint is of another model-parallel size",
                    got=f"{files} files of model states, saved by {saved_mp} model-parallel ranks",
                    expected=f"{self.engine.mp_world_size} of both",
                )
            )
        if self.model[Model.MODULE] is None:
            raise DeepSpeedCheckpointError(
                explain("the checkpoint is of a pipeline", got="no weights in the model states", expected="a module's")
            )

    @property
    def is_zero3(self) -> bool:
        return self.model_path.name.startswith(names.zero3_model_file(0)[: len("zero_pp")])

    def _open_optimizer(self) -> SavedState | None:
        if self.engine.optimizer is None and not self.is_zero3:
            return None
        if self.model.get(Model.PARAM_SHAPES) is not None:
            if self._shard_name(0) is None and not self.with_states:
                return None
            self._check_version()
            return from_shards(self._open_shard, self.model[Model.PARAM_SHAPES])
        inline = self._inline()
        if inline is None:
            return None
        shapes = {name: p.shape for p, name in self.engine.param_names.items()}
        return from_inline(inline, _optimizer_names(self.engine), shapes)

    def _inline(self) -> Mapping[str, Any] | None:
        experts = names.expert_optim_file(0, _mp_rank(self.engine))
        if self.folder.has(experts):
            return self.folder.load(experts)[Model.OPTIMIZER]
        return self.model.get(Model.OPTIMIZER)

    def _shard_name(self, rank: int) -> str | None:
        choices = names.optim_file_candidates(rank, _mp_rank(self.engine), bf16=self.engine.bfloat16_enabled())
        return next(filter(self.folder.has, choices), None)

    def _open_shard(self, rank: int) -> Mapping[str, Any]:
        name = self._shard_name(rank)
        if name is None:
            raise DeepSpeedCheckpointError(
                explain(
                    f"the optimizer shard of rank {rank} is missing in {self.path}",
                    expected=names.optim_file(rank, _mp_rank(self.engine), bf16=self.engine.bfloat16_enabled()),
                    fix="Bring all shards into one folder (with node-local storage each node holds its own), "
                    "or pass load_optimizer_states=False.",
                )
            )
        return self.folder.load(name)[Optim.STATE]

    def _check_version(self) -> None:
        text = self.model.get(Model.DS_VERSION)
        digits = [int(part) for part in str(text).split("+")[0].split(".")[:3] if part.isdigit()]
        if text is None or tuple(digits) < _OLDEST_STAGE1:
            raise AssertionError(
                explain(
                    "the checkpoint's optimizer shards are of an unknown format",
                    got="no ds_version" if text is None else f"ds_version {text}",
                    expected="0.3.17 or newer",
                    fix="Pass load_optimizer_states=False to load the weights only.",
                )
            )

    # - handing out

    def module(self, strict: bool, custom_load_fn: Any) -> None:
        """Load the weights."""
        if self.is_zero3 and self.saved is None:
            self.saved = from_shards(self._open_shard, self.model[Model.PARAM_SHAPES])
        weights = self._whole_weights() if self.is_zero3 else self.model[Model.MODULE]
        weights = self._with_experts(weights)
        load_module_state_dict(self.engine, {Model.MODULE: weights}, strict=strict, custom_load_fn=custom_load_fn)

    def _whole_weights(self) -> dict[str, torch.Tensor]:
        """The weights of a stage 3 checkpoint, put together from its shards."""
        saved, weights = self.saved, OrderedDict(self.model[Model.MODULE])
        assert saved is not None
        dtypes = {name: p.dtype for p, name in self.engine.param_names.items()}
        for group in self.model[Model.PARAM_SHAPES]:
            for name, shape in group.items():
                values = saved.full(name)
                if values is not None:
                    weights[name] = values.to(dtypes.get(name, values.dtype)).view(shape)
        for name, shape in (self.model.get(Model.FROZEN_PARAM_SHAPES) or {}).items():
            weights[name] = self._frozen(name, shape, saved.world)
        for alias, name in (self.model.get(Model.SHARED_PARAMS) or {}).items():
            weights[alias] = weights[name]
        return weights

    def _frozen(self, name: str, shape: torch.Size, world: int) -> torch.Tensor:
        parts = []
        for rank in range(world):
            file = names.zero3_model_file(rank, _mp_rank(self.engine))
            parts.append(self.folder.load(file)[Model.FROZEN_PARAM_FRAGMENTS][name].flatten())
        return torch.cat(parts)[: shape.numel()].view(shape)

    def _with_experts(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.engine.has_moe_layers or Model.NUM_EXPERTS not in self.model:
            return weights
        whole = OrderedDict(weights)
        mp_rank = _mp_rank(self.engine)
        for pattern in (f"layer_*_expert_*_mp_rank_{mp_rank:02d}_*.pt", f"expert_*_mp_rank_{mp_rank:02d}_*.pt"):
            for file in self.folder.glob(pattern):
                part = self.folder.load(file)
                whole.update(model_states.local_expert_state(part, _first_expert(self.engine)))
        return whole

    def masters_from_weights(self) -> None:
        """Make the optimizer's masters what the module's weights are."""
        if isinstance(self.engine.optimizer, ZeroOptimizer):
            self.engine.optimizer.refresh_fp32_params()

    def optimizer(self) -> None:
        """Load masters, and states if they are wanted."""
        engine = self.engine
        if isinstance(engine.optimizer, ZeroOptimizer):
            self._sharded_optimizer(engine.optimizer)
        elif engine.optimizer is not None and self.with_states:
            self._plain_optimizer(engine.optimizer)
        scaler = getattr(engine.driver, "scaler", None)
        if scaler is not None and self.with_states and self.model.get(_GRAD_SCALER):
            scaler.load_state_dict(self.model[_GRAD_SCALER])

    def _sharded_optimizer(self, optimizer: ZeroOptimizer) -> None:
        if self.saved is None:
            if self.with_states:
                logger.warning(f"{self.path} holds no optimizer states; masters are made from the weights")
            optimizer.refresh_fp32_params()
            return
        optimizer.load_state_dict(
            self.saved,
            load_optimizer_states=self.with_states,
            load_from_fp32_weights=self.engine.zero_load_from_fp32_weights(),
        )

    def _plain_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        inline, own = self._inline(), _optimizer_names(self.engine)
        as_torch = inline is not None and Zero.INNER not in inline
        if as_torch and inline.get(Zero.WRAPPER_NAMES, own) == own:
            zero_state.load_in_place(optimizer, own_memory(inline))
        elif self.saved is not None:
            zero_state.load_plain(optimizer, self.saved, own)
        else:
            logger.warning(f"{self.path} holds no optimizer states")

    def counters(self, with_scheduler: bool) -> None:
        """Load the counters, the scheduler and the samplers."""
        engine, model = self.engine, self.model
        engine.global_steps = model[Model.GLOBAL_STEPS]
        engine.global_samples = model.get(Model.GLOBAL_SAMPLES, engine.global_steps * engine.train_batch_size())
        engine.skipped_steps = model.get(Model.SKIPPED_STEPS, 0)
        engine.loaded_checkpoint_mp_world_size = model[Model.MP_WORLD_SIZE]
        engine.loaded_checkpoint_dp_world_size = model[Model.DP_WORLD_SIZE]
        engine.sparse_tensor_module_names = set(
            model.get(Model.SPARSE_MODULES) or model.get(Model.SPARSE_MODULES_OLD) or ()
        )
        if with_scheduler:
            _give_state(engine.lr_scheduler, model.get(Model.LR_SCHEDULER), "learning-rate scheduler")
        sampler = getattr(engine.training_dataloader, "data_sampler", None)
        _give_state(sampler, model.get(Model.DATA_SAMPLER), "data sampler")
        _give_state(engine.random_ltd_scheduler, model.get(Model.RANDOM_LTD), "random-LTD scheduler")

    def client_state(self, without: set[str]) -> dict[str, Any]:
        """What belongs to the caller, in memory of its own."""
        return {key: own_memory(value) for key, value in self.model.items() if key not in without}

    def close(self) -> None:
        """Let go of the files (Windows neither renames nor deletes mapped ones)."""
        self.model = {}
        if self.saved is not None:
            self.saved.close()


def _give_state(owner: Any, saved: Any, what: str) -> None:
    if not hasattr(owner, "load_state_dict"):
        return
    if saved is None:
        logger.warning(f"the checkpoint holds no state of a {what}; this run's starts afresh")
        return
    owner.load_state_dict(own_memory(saved))


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
        fetch_z3_params, z3_params_to_fetch: for sharded parameters; there are none below stage 3.
        allowed_missing_keys: names that may be absent though `strict`.

    Raises:
        RuntimeError: keys or shapes do not match.
    """
    weights = checkpoint[Model.MODULE]
    if custom_load_fn is not None:
        custom_load_fn(src=weights, dst=engine.module)
        return
    allowed = set(allowed_missing_keys or ())
    missing, unexpected = engine.module.load_state_dict(weights, strict=strict and not allowed)
    if strict and allowed and (unexpected or set(missing) - allowed):
        raise RuntimeError(
            explain(
                "the saved weights do not match the module",
                got=f"missing {sorted(set(missing) - allowed)}, unexpected {list(unexpected)}",
            )
        )


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


def save_16bit_model(engine: Any, save_dir: Any, save_filename: str, exclude_frozen_parameters: bool = False) -> bool:
    """Save the module's weights as one file, collectively; see `DeepSpeedEngine.save_16bit_model`."""
    crew = crew_of(engine)

    def write() -> None:
        if crew.rank != 0:
            return
        path = Path(save_dir) / save_filename
        disk.make_folder(path.parent)
        temporary = path.with_name(path.name + names.PARTIAL_SUFFIX)
        try:
            save_file(temporary, module_state_dict(engine, exclude_frozen_parameters=exclude_frozen_parameters))
            disk.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    crew.together(write)
    return True


def consolidated_16bit_state_dict(engine: Any, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
    """The whole module's weights in host memory on rank 0, None on the others."""
    if engine.mesh.world.rank != 0:
        return None
    state = module_state_dict(engine, exclude_frozen_parameters=exclude_frozen_parameters)
    return OrderedDict((name, value.detach().cpu()) for name, value in state.items())
