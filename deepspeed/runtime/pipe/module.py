# SPDX-License-Identifier: Apache-2.0
"""A model as a list of layers, of which each stage of a pipeline builds and holds its own."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import utils
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.utils.errors import explain

from .topology import PipeDataParallelTopology, PipelineParallelGrid, ProcessTopology


class PipelineError(Exception):
    """A use of a pipeline that it does not allow."""


class LayerSpec:
    """A layer that is built on the stage that holds it, and nowhere else.

    Args:
        typename: the module's class, or any callable that makes one.
        *module_args, **module_kwargs: what it is called with.

    Raises:
        RuntimeError: `typename` is no class of modules.
    """

    def __init__(self, typename: Any, *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise RuntimeError(
                explain(
                    "LayerSpec only supports torch.nn.Module types",
                    got=repr(typename),
                    expected="a class derived from torch.nn.Module",
                )
            )
        self.typename = typename
        self.module_args, self.module_kwargs = module_args, module_kwargs
        self.global_rank = dist.get_rank() if dist.is_initialized() else -1

    def __repr__(self) -> str:
        given = [repr(arg) for arg in self.module_args]
        given += [f"{key}={value!r}" for key, value in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(given)})"

    def build(self, log: bool = False) -> nn.Module:
        """Make the module."""
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """A layer whose weights several layers of the list share.

    Args:
        key: layers of one key share.
        typename: the module's class.
        forward_fn: called with the module and the input in place of the module itself.
        tied_weight_attr: names of the shared weights inside the module, dotted.
    """

    def __init__(
        self,
        key: str,
        typename: Any,
        *module_args: Any,
        forward_fn: Callable[..., Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = (
            [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)
        )


class PipelineModule(nn.Module):
    """The layers of this rank's stage.

    Args:
        layers: modules, `LayerSpec`s and plain functions; each gets what the one before it returned.
        num_stages: stages to cut the layers into.
        topology: the grid of ranks, in place of `num_stages`.
        loss_fn: called with the last output and the labels.
        seed_layers: seed each layer with `base_seed` plus its number before it is built.
        seed_fn: seeds in place of torch's and the accelerator's own.
        base_seed: see `seed_layers`.
        partition_method: "parameters" (even numbers of trainable parameters), "uniform" (of layers), or "type:REGEX"
            (of layers whose class matches).
        activation_checkpoint_interval: layers to a checkpoint of activations; 0 for none.
        activation_checkpoint_func: checkpoints a function's activations.
        checkpointable_layers: names of the classes that may be checkpointed; None for all with parameters.
        dynamic_shape: whether activations differ in shape from micro-batch to micro-batch.

    Raises:
        RuntimeError: neither `num_stages` nor `topology`, or ranks that do not divide into the stages.
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpointing.checkpoint,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
    ) -> None:
        super().__init__()
        if num_stages is None and topology is None:
            raise RuntimeError("must provide num_stages or topology")
        self.loss_fn, self.dynamic_shape = loss_fn, dynamic_shape
        self.seed_layers, self.seed_fn, self.base_seed = seed_layers, seed_fn, base_seed
        self.checkpointable_layers = checkpointable_layers
        self.activation_checkpoint_interval = activation_checkpoint_interval
        self.activation_checkpoint_func = activation_checkpoint_func
        if not dist.is_initialized():
            dist.init_distributed()
        self._topo = topology or _even_topology(int(num_stages or 1))
        self._grid = PipelineParallelGrid(self._topo)
        self.num_stages, self.stage_id = self._topo.get_dim("pipe"), self._grid.get_stage_id()
        self.global_rank, self.world_size = self._grid.global_rank, self._grid.world_size
        self._layer_specs = list(layers)
        self._num_layers = len(self._layer_specs)
        self.parts = self._partition(partition_method)
        self._local_start, self._local_stop = self.parts[self.stage_id : self.stage_id + 2]
        self.forward_funcs: list[Any] = []
        self.tied_modules = nn.ModuleDict()
        self.tied_weight_attrs: dict[str, list[str]] = {}
        self._build()
        self.to(get_accelerator().current_device_name())
        self.tied_comms = self._index_tied_modules()
        self._synchronize_tied_weights()

    # - construction

    def _partition(self, method: str) -> list[int]:
        method = method.lower()
        if method == "uniform":
            return utils.partition_uniform(self._num_layers, self.num_stages)
        if method == "parameters":
            weights = [_trainable_numel(spec) for spec in self._layer_specs]
        elif method.startswith("type:"):
            pattern = re.compile(method.split(":", 1)[1], re.IGNORECASE)
            weights = [int(bool(pattern.search(_type_name(spec)))) for spec in self._layer_specs]
            if not any(weights):
                raise RuntimeError(
                    explain(
                        "no layer matches the partition method",
                        got=f"partition_method={method!r}",
                        expected=f"one of {sorted({_type_name(s) for s in self._layer_specs})}",
                    )
                )
        else:
            raise NotImplementedError(
                explain(
                    "unknown partition method",
                    got=repr(method),
                    expected="'uniform', 'parameters' or 'type:REGEX'",
                )
            )
        return utils.partition_balanced(weights, self.num_stages)

    def _build(self) -> None:
        for number in range(self._local_start, self._local_stop):
            if self.seed_layers:
                (self.seed_fn or utils.set_random_seed)(self.base_seed + number)
            layer = self._layer_specs[number]
            name = str(number)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
                    self.tied_weight_attrs[layer.key] = layer.tied_weight_attr
                module = self.tied_modules[layer.key]
                call = module if layer.forward_fn is None else partial(layer.forward_fn, module)
                self.forward_funcs.append(call)
            elif isinstance(layer, (LayerSpec, nn.Module)):
                module = layer.build() if isinstance(layer, LayerSpec) else layer
                self.forward_funcs.append(module)
                self.add_module(name, module)
            else:
                self.forward_funcs.append(layer)
        for param in self.parameters():
            param.ds_pipe_replicated = False

    def _index_tied_modules(self) -> dict[str, dict[str, Any]]:
        """For each key of tied layers, the ranks that hold it. Collective: groups are made on all ranks."""
        found: dict[str, dict[str, Any]] = {}
        keys = [spec.key for spec in self._layer_specs if isinstance(spec, TiedLayerSpec)]
        for key in dict.fromkeys(keys):
            stages = sorted(
                {
                    self.stage_owner(number)
                    for number, spec in enumerate(self._layer_specs)
                    if isinstance(spec, TiedLayerSpec) and spec.key == key
                }
            )
            for column in self._topo.get_axis_comm_lists("pipe"):
                ranks = [column[stage] for stage in stages]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    module = self.tied_modules[key]
                    attrs = self.tied_weight_attrs[key]
                    found[key] = {
                        "ranks": ranks,
                        "group": group,
                        "weight_attr": attrs,
                        "module": module,
                    }
                    for param in (_by_path(module, attr) for attr in attrs):
                        param.ds_pipe_replicated = self.global_rank != min(ranks)
        return found

    def _synchronize_tied_weights(self) -> None:
        for weight, tied in self.tied_weights():
            dist.broadcast(weight.data, src=min(tied["ranks"]), group=tied["group"])

    def tied_weights(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """Each weight that other stages hold too, with its row of `tied_comms`."""
        return [
            (_by_path(tied["module"], attr), tied)
            for tied in self.tied_comms.values()
            if len(tied["ranks"]) > 1
            for attr in tied["weight_attr"]
        ]

    def tied_trainable(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """Those of `tied_weights` that get gradients."""
        return [(weight, tied) for weight, tied in self.tied_weights() if weight.requires_grad]

    # - use

    def forward(self, forward_input: Any) -> Any:
        """Run this stage's layers one after another."""
        interval = self.activation_checkpoint_interval
        count = len(self.forward_funcs)
        if interval <= 0:
            return self._run(0, count)(forward_input)
        value = forward_input
        for start, checkpointable in zip(
            range(0, count, interval), self.is_checkpointable_results, strict=True
        ):
            stop = min(start + interval, count)
            if checkpointable:
                is_tuple = isinstance(value, tuple)
                given = value if is_tuple else (value,)
                run = self._run(start, stop, is_tuple)
                value = self.activation_checkpoint_func(run, *given)
            else:
                value = self._run(start, stop)(value)
        return value

    def _run(self, start: int, stop: int, is_tuple: bool = False) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            value = inputs if is_tuple else inputs[0]
            for number, layer in enumerate(self.forward_funcs[start:stop], start):
                if self.seed_layers:
                    seed = self.base_seed + self._local_start + number
                    (self.seed_fn or utils.set_random_seed)(seed)
                value = layer(value)
            return value

        return run

    def _is_checkpointable(self, funcs: Sequence[Any]) -> bool:
        if self.checkpointable_layers is not None:
            return all(type(f).__name__ in self.checkpointable_layers for f in funcs)
        return any(
            next(f.parameters(), None) is not None for f in funcs if isinstance(f, nn.Module)
        )

    @property
    def is_checkpointable_results(self) -> list[bool]:
        """For each run of `activation_checkpoint_interval` layers, whether its activations may be checkpointed."""
        funcs, interval = self.forward_funcs, self.activation_checkpoint_interval
        starts = range(0, len(funcs), interval) if interval > 0 else ()
        return [self._is_checkpointable(funcs[start : start + interval]) for start in starts]

    def _precompute_checkpointable_values(self) -> None:
        """Kept for callers: nothing is kept of what `is_checkpointable_results` says."""

    def allreduce_tied_weight_gradients(self) -> None:
        """Add up the gradients of tied weights over the stages that hold them. Collective of those."""
        for weight, tied in self.tied_trainable():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad, group=tied["group"])

    def partitions(self) -> list[int]:
        """The first layer of each stage, and the number of layers."""
        return self.parts

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that holds a layer."""
        for stage in range(self.num_stages):
            if self.parts[stage] <= layer_idx < self.parts[stage + 1]:
                return stage
        raise RuntimeError(f"layer {layer_idx} is not one of {self._num_layers}")

    def set_checkpoint_interval(self, interval: int) -> None:
        """Checkpoint activations of so many layers together."""
        self.activation_checkpoint_interval = interval

    def topology(self) -> ProcessTopology:
        """The grid of ranks."""
        return self._topo

    def mpu(self) -> PipelineParallelGrid:
        """The process groups along the grid."""
        return self._grid

    def num_pipeline_stages(self) -> int:
        """Number of stages."""
        return self.num_stages

    def get_additional_losses(self) -> Mapping[str, torch.Tensor] | None:
        """Further losses of the last forward pass by name; for subclasses."""
        return None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each layer in place."""
        for layer in self.forward_funcs:
            if isinstance(layer, nn.Module):
                layer.compile(*args, **kwargs)

    # - checkpoints: a file a layer

    def ckpt_prefix(self, checkpoints_path: Any, tag: Any) -> str:
        """Beginning of the names of files of this rank's part of a model."""
        place = self._topo.get_coord(self.global_rank)
        axes = [axis for axis in self._topo.get_axis_names() if axis != "data"]
        words = "".join(f"-{axis}_{getattr(place, axis):02d}" for axis in axes)
        return str(Path(checkpoints_path) / str(tag) / "module") + words

    def ckpt_layer_path(self, ckpt_dir: Any, local_layer_idx: int) -> str:
        """The file of one of this stage's layers, counted from the stage's first."""
        rank_name = self._topo.get_rank_repr(self.global_rank)
        words = f"-{rank_name}" if rank_name else ""
        number = local_layer_idx + self._local_start
        return str(Path(ckpt_dir) / f"layer_{number:02d}{words}-model_states.pt")

    def ckpt_layer_path_list(self, ckpt_dir: Any, local_layer_idx: int) -> list[str]:
        """The files of all slices of one of this stage's layers."""
        number = local_layer_idx + self._local_start
        return [str(p) for p in sorted(Path(ckpt_dir).glob(f"layer_{number:02d}-*model_states.pt"))]

    def layer_states(self, exclude_frozen_params: bool = False) -> OrderedDict[str, dict[str, Any]]:
        """File name -> state dict, of each of this stage's layers that has one."""
        files: OrderedDict[str, dict[str, Any]] = OrderedDict()
        for local, layer in enumerate(self.forward_funcs):
            module = _module_of(layer)
            if not hasattr(module, "state_dict"):
                continue
            frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
            state = module.state_dict()
            kept = {k: v for k, v in state.items() if not (exclude_frozen_params and k in frozen)}
            files[Path(self.ckpt_layer_path("", local)).name] = kept
        return files

    def save_state_dict(
        self, save_dir: Any, checkpoint_engine: Any, exclude_frozen_params: bool = False
    ) -> None:
        """Save this stage's layers, where this rank is the first of its data-parallel ones."""
        if self._grid.data_parallel_id != 0:
            return
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        for name, state in self.layer_states(exclude_frozen_params).items():
            checkpoint_engine.save(state, str(Path(save_dir) / name))

    def named_in_layers(self, load: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
        """What the files of this stage's layers hold, by its name in this module; `load` is as in `load_layers`."""
        named = {id(module): name for name, module in self.named_modules()}
        return {
            f"{named[id(module)]}.{key}": value
            for local, module in enumerate(map(_module_of, self.forward_funcs))
            if hasattr(module, "state_dict")
            for key, value in load(Path(self.ckpt_layer_path("", local)).name).items()
        }

    def load_layers(self, load: Callable[[str], Mapping[str, Any]], strict: bool = True) -> None:
        """Take over this stage's layers; `load` gives the state dict of a file name."""
        for local, layer in enumerate(self.forward_funcs):
            module = _module_of(layer)
            if hasattr(module, "load_state_dict"):
                state = load(Path(self.ckpt_layer_path("", local)).name)
                module.load_state_dict(state, strict=strict)
        self._synchronize_tied_weights()

    def load_state_dir(self, load_dir: Any, checkpoint_engine: Any, strict: bool = True) -> None:
        """Load this stage's layers from a folder."""
        self.load_layers(
            lambda name: checkpoint_engine.load(str(Path(load_dir) / name), map_location="cpu"),
            strict,
        )


def _module_of(layer: Any) -> Any:
    """The module behind a layer: a tied one may be called through a function."""
    if isinstance(layer, partial) and layer.args and isinstance(layer.args[0], nn.Module):
        return layer.args[0]
    return layer


def _even_topology(num_stages: int) -> ProcessTopology:
    world = dist.get_world_size()
    if world % num_stages:
        raise RuntimeError(
            explain(
                "the ranks do not divide into the stages",
                got=f"{world} ranks, num_stages={num_stages}",
                expected="a multiple of num_stages",
            )
        )
    return PipeDataParallelTopology(num_pp=num_stages, num_dp=world // num_stages)


def _trainable_numel(spec: Any) -> int:
    """Trainable parameters of a layer; one that is not built yet is built without memory, if it can be."""
    if isinstance(spec, LayerSpec):
        try:
            with torch.device("meta"):
                spec = spec.build()
        except (RuntimeError, NotImplementedError):  # its constructor looks at values
            with torch.random.fork_rng():
                spec = spec.build()
    if not isinstance(spec, nn.Module):
        return 0
    return sum(p.numel() for p in spec.parameters() if p.requires_grad)


def _type_name(spec: Any) -> str:
    if isinstance(spec, LayerSpec):
        return spec.typename.__name__
    return type(spec).__name__ if isinstance(spec, nn.Module) else getattr(spec, "__name__", "")


def _by_path(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
