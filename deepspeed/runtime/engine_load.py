# SPDX-License-Identifier: Apache-2.0
"""What an engine takes over from a checkpoint: the engine's side of `load_checkpoint`.

How files are read so that none does harm is `checkpoint.reader`; how a state of another number of ranks, another stage
or another dtype is read is `checkpoint.reshard`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import format as names
from ..checkpoint import model_states, random_states, stacked_experts
from ..checkpoint.atomic import resolve
from ..checkpoint.format import Model, Optim, Zero
from ..checkpoint.reader import Folder, own_memory, read_tag
from ..checkpoint.reshard import SavedState, from_inline, from_shards
from ..checkpoint.tensor_parts import _get_param_uc_restore_meta
from ..checkpoint.universal_checkpoint import open_universal
from ..checkpoint.weights import of_frozen, of_masters
from ..utils.env import DS_RESUME_POSITION, DS_VERIFY_CHECKPOINTS
from ..utils.errors import DeepSpeedCheckpointError, explain
from ..utils.logging import logger
from . import compressing, saved_experts, saved_folding
from .engine_checkpoint import (
    GRAD_SCALER,
    crew_of,
    expert_rank,
    first_expert,
    has_shards,
    keeps_position,
    mp_rank_of,
    optimizer_names,
    slices_of,
)
from .engine_weights import load_module_state_dict
from .zero import load_state
from .zero.optimizer import ZeroOptimizer
from .zero.own_slice import shape_of

_OLDEST_STAGE1 = (0, 3, 17)


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
        ValueError: a universal checkpoint is asked for and there is none.
    """
    crew, root = crew_of(engine), Path(load_dir)
    universal = engine.load_universal_checkpoint()
    folder = crew.together(lambda: _find_tag(root, tag, universal))[crew.rank]
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
        own = set(names.KEYS_NOT_IN_CLIENT_STATE) | {GRAD_SCALER}
        own |= {Model.LR_SCHEDULER} if load_lr_scheduler_states else set()
        client_state = load.client_state(
            own | ({Model.OPTIMIZER} if load_optimizer_states else set())
        )
        if load_optimizer_states and not has_shards(engine) and engine.optimizer is not None:
            client_state[Model.OPTIMIZER] = engine.optimizer.state_dict()
        return str(load.model_path), client_state
    finally:
        load.close()


def _find_tag(root: Path, tag: Any, universal: bool) -> Path | None:
    pointer = names.LATEST_UNIVERSAL if universal else names.LATEST
    text = read_tag(root, pointer) if tag is None else str(tag)
    if text is None and universal:
        raise ValueError(
            explain(
                f"there is no file '{pointer}' in {root}",
                got="checkpoint.load_universal and no tag",
                fix="Convert a checkpoint by python -m deepspeed.checkpoint.ds_to_universal, or pass tag=...",
            )
        )
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
        self.universal = engine.load_universal_checkpoint()
        self.model: dict[str, Any] = {}
        self.saved: SavedState | None = None

    # - opening

    def open(self) -> None:
        """Read the model states, and the parts of the optimizer that this rank is going to copy."""
        self.folder = Folder(self.path, verify=DS_VERIFY_CHECKPOINTS.get())
        mp_rank = mp_rank_of(self.engine)
        choices = [names.model_file(mp_rank), names.zero3_model_file(0, mp_rank)]
        if self.universal:  # it may be of fewer tensor-parallel ranks
            choices.append(names.model_file(0))
        self.model_path = self.path / next(filter(self.folder.has, choices), choices[0])
        files = self.folder.model_files()
        if not files:
            raise AssertionError(
                explain(
                    f"there are no model states in {self.path}",
                    got="a folder without *_model_states.pt"
                    if self.path.is_dir()
                    else "no such folder",
                    expected=choices[0],
                    fix="Check load_dir and tag.",
                )
            )
        sharded = isinstance(self.engine.optimizer, ZeroOptimizer) or self.with_states
        self.model = self.folder.load(self.model_path.name)
        self._check_model(len(files))
        if sharded:
            self.saved = self._open_optimizer()
        if self.saved is not None and isinstance(self.engine.optimizer, ZeroOptimizer):
            load_state.open_needed(self.engine.optimizer, self.saved)

    def _check_model(self, files: int) -> None:
        if lacking := names.missing_keys(
            self.model, (Model.MODULE, Model.DP_WORLD_SIZE, Model.MP_WORLD_SIZE)
        ):
            raise DeepSpeedCheckpointError(
                explain(
                    f"{self.model_path} is no file of model states",
                    got=f"no key {', '.join(lacking)}",
                )
            )
        saved_mp = self.model[Model.MP_WORLD_SIZE]
        if not self.universal and not files == saved_mp == self.engine.mp_world_size:
            raise AssertionError(
                explain(
                    "the checkpoint is of another model-parallel size",
                    got=f"{files} files of model states, saved by {saved_mp} model-parallel ranks",
                    expected=f"{self.engine.mp_world_size} of both",
                )
            )
        saved_folding.check(self.engine, self.model)
        layers = self.engine.pipeline_parallelism
        if self.model[Model.MODULE] is None and not (self.universal or layers):
            raise DeepSpeedCheckpointError(
                explain(
                    "the checkpoint is of a pipeline",
                    got="no weights in the model states",
                    expected="a module's",
                )
            )

    @property
    def is_zero3(self) -> bool:
        return self.model_path.name.startswith(names.zero3_model_file(0)[: len("zero_pp")])

    def _open_optimizer(self) -> SavedState | None:
        if self.engine.optimizer is None and not self.is_zero3:
            return None
        if self.universal:
            return self._open_universal()
        if self.model.get(Model.PARAM_SHAPES) is not None:
            if self._shard_name(self._near()) is None and not self.with_states:
                return None
            self._check_version()
            return self._from_shards()
        inline = self._inline
        if inline is None:
            return None
        return from_inline(inline, optimizer_names(self.engine), self._own_shapes())

    def _own_shapes(self) -> dict[str, torch.Size]:
        """The shapes of the module's parameters when whole."""
        return {name: shape_of(p) for p, name in self.engine.param_names.items()}

    def _from_shards(self) -> SavedState:
        config = self.model.get(Model.DS_CONFIG) or {}
        data_first = bool(config.get(names.DATA_BEFORE_EXPERT))
        shapes = self.model[Model.PARAM_SHAPES]
        stacks = stacked_experts.stacked_names(self.model.get(Model.AUTOEP_LAYERS) or ())
        lanes, lane = saved_folding.lanes_of(self.engine)

        def shard(rank: int) -> Mapping[str, Any]:
            return self._open_shard(rank // lanes, rank % lanes if lanes > 1 else None)

        near = self._near() * lanes + lane
        saved = from_shards(shard, shapes, near, data_first, stacks, (lanes, lane))
        windows = saved_experts.share_windows(self.engine, self._own_shapes(), saved.shapes)
        saved = saved.shares(windows)
        return saved.under_names(self._saved_names(saved.pieces))

    def _saved_names(self, found: Iterable[str]) -> dict[str, str]:
        """The name that each parameter was saved under: experts are numbered over all ranks there."""
        if not self.engine.has_moe_layers:
            return {name: name for name in found}
        first = first_expert(self.engine)
        own = self.engine.param_names.values()
        there = {name: model_states.expert_renumbered(name, first) for name in own}
        rest = {name: name for name in found if not model_states.is_expert(name)}
        return {**rest, **there}

    def _open_universal(self) -> SavedState:
        engine = self.engine
        own = self._own_shapes()
        there = self._saved_names(own)
        shapes = {there[name]: shape for name, shape in own.items()}
        groups = [list(group) for group in self.model.get(Model.PARAM_SHAPES) or ()]
        rank, size = slices_of(engine)
        cuts = {
            there[name]: cut
            for p, name in engine.param_names.items()
            if (cut := _get_param_uc_restore_meta(p)) is not None
        }
        shares = saved_experts.shares_of(engine)
        saved = open_universal(self.folder, shapes, groups, rank, size, cuts, shares)
        return saved.under_names(there)

    def _near(self) -> int:
        """A saved rank whose shard is here: with node-local storage perhaps this rank's only."""
        rank = self.engine.mesh.sequence_data.rank
        return rank if self._shard_name(rank) is not None else 0

    @cached_property
    def _inline(self) -> Mapping[str, Any] | None:
        """The states of an optimizer that is not sharded."""
        mp_rank = mp_rank_of(self.engine)
        if found := self.folder.glob(f"expp_rank_*_mp_rank_{mp_rank:02d}_optim_states.pt"):
            ranks = saved_folding.expert_places(self.engine)
            if len(found) != ranks:
                raise DeepSpeedCheckpointError(
                    explain(
                        "the optimizer states of experts are of another expert-parallel size",
                        got=f"{len(found)} files, without ZeRO",
                        expected=f"{ranks}",
                        fix="Load with the ep_size that saved, pass load_optimizer_states=False, or save "
                        "with ZeRO stage 1 or 2, whose shards load at any ep_size.",
                    )
                )
            name = names.expert_optim_file(expert_rank(self.engine), mp_rank)
            return self.folder.load(name)[Model.OPTIMIZER]
        return self.model.get(Model.OPTIMIZER)

    def _shard_name(self, rank: int, mp_rank: int | None = None) -> str | None:
        mp_rank = mp_rank_of(self.engine) if mp_rank is None else mp_rank
        choices = names.optim_file_candidates(rank, mp_rank, bf16=self.engine.bfloat16_enabled())
        return next(filter(self.folder.has, choices), None)

    def _open_shard(self, rank: int, mp_rank: int | None = None) -> Mapping[str, Any]:
        name = self._shard_name(rank, mp_rank)
        if name is None:
            raise DeepSpeedCheckpointError(
                explain(
                    f"the optimizer shard of rank {rank} is missing in {self.path}",
                    expected=names.optim_file(
                        rank, mp_rank_of(self.engine), bf16=self.engine.bfloat16_enabled()
                    ),
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
        pipeline = self.engine.module if self.engine.pipeline_parallelism else None
        if self.model[Model.MODULE] is None and pipeline is not None:
            pipeline.load_layers(self.folder.load, strict)
            return
        if self.universal:
            self.saved = self.saved or self._open_universal()
        elif self.is_zero3 and self.saved is None:
            self.saved = self._from_shards()
        in_pieces = self.is_zero3 or self.universal
        weights = self._weights_in_pieces() if in_pieces else self.model[Model.MODULE]
        weights = self._with_experts(weights)
        if pipeline is not None and self.universal:
            weights = {**pipeline.named_in_layers(self.folder.load), **weights}
        load_module_state_dict(
            self.engine, {Model.MODULE: weights}, strict=strict, custom_load_fn=custom_load_fn
        )

    def _weights_in_pieces(self) -> dict[str, Any]:
        """The weights of a stage 3 or universal checkpoint, by their master weights; nothing is read yet."""
        saved, weights = self.saved, OrderedDict(self._here(self.model[Model.MODULE] or {}))
        assert saved is not None
        for name, shape in saved.shapes.items():
            if saved.pieces[name] or 0 in shape:
                weights[name] = of_masters(saved, name)
        if self.is_zero3:
            world = self.model[Model.DP_WORLD_SIZE] if self.universal else saved.world
            mp_rank = mp_rank_of(self.engine)
            weights.update(self._here(of_frozen(self.model, world, self.folder.load, mp_rank)))
        for alias, name in (self.model.get(Model.SHARED_PARAMS) or {}).items():
            if name in weights:  # frozen ones may have been left out
                weights[alias] = weights[name]
        return weights

    def _here(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        """Weights of all experts, under this rank's numbers and without other ranks' experts."""
        if not self.engine.mesh.spreads_experts:
            return weights
        own = self.engine.module.state_dict().keys()
        return model_states.experts_here(weights, own, first_expert(self.engine))

    def _with_experts(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.engine.has_moe_layers or Model.NUM_EXPERTS not in self.model:
            return weights
        whole, own = OrderedDict(weights), set(self.engine.module.state_dict())
        wanted = self._own_experts()
        shares = saved_experts.shares_of(self.engine)
        stacks = {name: shape for name, shape in self._own_shapes().items() if name in shares}
        for pattern in names.expert_files(mp_rank_of(self.engine)):
            for file in self.folder.glob(pattern):
                if names.expert_of(file) not in wanted:
                    continue
                part = self.folder.load(file)
                stacked_experts.fill_stacks(whole, part, first_expert(self.engine), stacks)
                local = model_states.local_expert_state(part, first_expert(self.engine))
                whole.update((name, value) for name, value in local.items() if name in own)
        return whole

    def _own_experts(self) -> set[int]:
        """Global numbers of the experts that this rank has in any layer."""
        first, module = first_expert(self.engine), self.engine.module
        return {
            first(layer) + local
            for layer in model_states.moe_prefixes(module)
            for local in range(module.get_submodule(layer).num_local_experts)
        }

    def masters_from_weights(self) -> None:
        """Make the optimizer's masters what the module's weights are, or were before they were rounded."""
        optimizer = self.engine.optimizer
        if not isinstance(optimizer, ZeroOptimizer):
            return
        if self.universal and self.saved is not None and self.saved.has_masters:
            optimizer.load_state_dict(
                self.saved, load_optimizer_states=False, load_from_fp32_weights=True
            )
        else:
            optimizer.refresh_fp32_params()

    def optimizer(self) -> None:
        """Load masters, and states if they are wanted."""
        engine = self.engine
        if isinstance(engine.optimizer, ZeroOptimizer):
            self._sharded_optimizer(engine.optimizer)
        elif engine.optimizer is not None and self.with_states:
            self._plain_optimizer(engine.optimizer)
        scaler = getattr(engine.driver, "scaler", None)
        if scaler is not None and self.with_states and self.model.get(GRAD_SCALER):
            scaler.load_state_dict(self.model[GRAD_SCALER])

    def _sharded_optimizer(self, optimizer: ZeroOptimizer) -> None:
        if self.saved is None:
            if self.with_states:
                logger.warning(
                    f"{self.path} holds no optimizer states; masters are made from the weights"
                )
            optimizer.refresh_fp32_params()
            return
        optimizer.load_state_dict(
            self.saved,
            load_optimizer_states=self.with_states,
            load_from_fp32_weights=self.engine.zero_load_from_fp32_weights(),
        )

    def _plain_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        inline, own = self._inline, optimizer_names(self.engine)
        as_torch = inline is not None and Zero.INNER not in inline
        if as_torch and inline.get(Zero.WRAPPER_NAMES, own) == own:
            load_state.load_in_place(optimizer, own_memory(inline))
        elif self.saved is not None:
            load_state.load_plain(optimizer, self.saved, own)
        else:
            logger.warning(f"{self.path} holds no optimizer states")

    def _sparse_names(self) -> None:
        """Take over which weights are said to have sparse gradients, of those that the file and the model both have."""
        model, engine = self.model, self.engine
        said = model.get(Model.SPARSE_MODULES) or model.get(Model.SPARSE_MODULES_OLD) or ()
        own = set(engine.param_names.values())
        lacking = own - set(model.get(Model.MODULE) or own)
        engine.sparse_tensor_module_names = (set(said) & own) | (
            engine.sparse_tensor_module_names & lacking
        )

    def counters(self, with_scheduler: bool) -> None:
        """Load the counters, the scheduler and the samplers."""
        engine, model = self.engine, self.model
        engine.global_steps = model[Model.GLOBAL_STEPS]
        engine.global_samples = model.get(
            Model.GLOBAL_SAMPLES, engine.global_steps * engine.train_batch_size()
        )
        engine.skipped_steps = model.get(Model.SKIPPED_STEPS, 0)
        engine.loaded_checkpoint_mp_world_size = model[Model.MP_WORLD_SIZE]
        engine.loaded_checkpoint_dp_world_size = model[Model.DP_WORLD_SIZE]
        self._sparse_names()
        if with_scheduler:
            _give_state(
                engine.lr_scheduler, model.get(Model.LR_SCHEDULER), "learning-rate scheduler"
            )
            if self.with_states and self.saved is not None and not self.saved.hyper:
                self._rates_from_schedule()
        if self.with_states and DS_RESUME_POSITION.get():
            self._resume_position()
        sampler = getattr(engine.training_dataloader, "data_sampler", None)
        _give_state(sampler, model.get(Model.DATA_SAMPLER), "data sampler")
        _give_state(
            engine.random_ltd_scheduler, model.get(Model.RANDOM_LTD), "random-LTD scheduler"
        )
        compressing.resume(engine)

    def _rates_from_schedule(self) -> None:
        """Set the learning rates of the next step where none were saved (upstream's elastic form has none)."""
        scheduler, optimizer = self.engine.lr_scheduler, self.engine.optimizer
        if hasattr(scheduler, "last_batch_iteration") and optimizer is not None:
            for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=False):
                group["lr"] = rate

    def _resume_position(self) -> None:
        """Go on with the random numbers and the batches that would have come next."""
        engine, states = self.engine, self.model.get(Model.RANDOM_STATES) or []
        world = engine.mesh.world
        if len(states) == world.size:
            random_states.restore(states[world.rank])
        loader, position = engine.training_dataloader, self.model.get(Model.LOADER_POSITION)
        if position and hasattr(loader, "load_state_dict") and not keeps_position(loader):
            loader.load_state_dict(own_memory(position))
            if engine.pipeline_parallelism:
                engine.set_dataloader(loader)  # its iterator may still stand where it began

    def client_state(self, without: set[str]) -> dict[str, Any]:
        """What belongs to the caller, in memory of its own."""
        return {key: own_memory(value) for key, value in self.model.items() if key not in without}

    def close(self) -> None:
        """Let go of the files (Windows neither renames nor deletes mapped ones)."""
        self.model = {}
        vars(self).pop("_inline", None)
        if self.saved is not None:
            self.saved.close()


def _give_state(owner: Any, saved: Any, what: str) -> None:
    if not hasattr(owner, "load_state_dict"):
        return
    if saved is None:
        logger.warning(f"the checkpoint holds no state of a {what}; this run's starts afresh")
        return
    owner.load_state_dict(own_memory(saved))
