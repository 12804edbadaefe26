# SPDX-License-Identifier: Apache-2.0
"""The training engine: it says when; what happens is done by the parts it is composed of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module

from deepspeed.accelerator.lowp_products import products_context

from . import (
    build,
    build_checks,
    compressing,
    engine_checkpoint,
    engine_load,
    forward_kwargs,
    memory_plan,
    module_prep,
    ownership,
)
from .backward import BackwardWatch
from .build_mesh import build_mesh
from .clock import AccumulationClock
from .eigenvalue import summary_events as _eigenvalue_summary_events  # noqa: F401  (its older home)
from .engine_accessors import ConfigAccessors
from .engine_checkpoint import parallel_metadata as _checkpoint_parallel_metadata  # noqa: F401
from .engine_compile import CompileControl
from .engine_data import DataControl
from .engine_experts import ExpertControl, dist, groups  # noqa: F401  (names that callers look up here)
from .observers import build_observers
from .sparse_gradients import SparseGradients, row_names
from .zero import offload_states


class DeepSpeedEngine(
    ConfigAccessors, CompileControl, DataControl, ExpertControl, SparseGradients, Module
):
    """Wraps a module with its optimizer, scheduler, precision and sharding; see `deepspeed.initialize`.

    Args:
        args: command-line namespace or dict; `local_rank` and `device_rank` are read from it.
        model: module to train.
        optimizer: torch optimizer, or a callable from parameters to one; None takes the configuration's.
        model_parameters: parameters or groups for an optimizer that the engine builds.
        training_data: dataset for `training_dataloader`.
        lr_scheduler: scheduler, or a callable from the optimizer to one.
        mpu: object that knows the model-parallel groups.
        dist_init_required: passed to `init_distributed`.
        collate_fn: for `training_dataloader`.
        config: the raw configuration, kept as `engine.config`.
        config_class: the parsed `DeepSpeedConfig`.
        mesh_device: device mesh over data and sequence ranks.
        dont_change_device: leave the module where it is.
    """

    def __init__(
        self,
        args: Any,
        model: torch.nn.Module,
        optimizer: Any = None,
        model_parameters: Any = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        dist_init_required: bool | None = None,
        collate_fn: Any = None,
        config: Any = None,
        config_class: Any = None,
        mesh_device: Any = None,
        dont_change_device: bool = False,
    ) -> None:
        super().__init__()
        self._config = build_checks.accept(config_class, optimizer, lr_scheduler)
        self.config = config if isinstance(config, dict) else self._config._param_dict
        self.mpu, self.mesh_device = mpu, mesh_device
        self.client_optimizer, self.client_lr_scheduler = optimizer, lr_scheduler
        self.training_data, self.collate_fn = training_data, collate_fn
        self.dont_change_device = dont_change_device
        self.local_rank = module_prep.take_local_rank(args)
        build_checks.check_request(self._config, model, optimizer, lr_scheduler)
        self.device = module_prep.take_device(args, self.local_rank, model, dont_change_device)
        self.has_moe_layers, self.num_experts = self._prepare_experts(model)
        self.mesh = build_mesh(self._config, mpu, mesh_device)
        build.divide_layers(self._config, model, self.mesh, self.device)
        self.precision = build.build_precision(self._config)
        self.plan = build.build_plan(self._config, self.mesh.sequence.size)
        self.clock = AccumulationClock(
            self._config.gradient_accumulation_steps, self._config.managed_gradient_accumulation
        )
        memory_plan.refuse_what_cannot_fit(
            self._config, model, self.mesh.sequence_data.size, self.device, optimizer
        )
        ownership.release_former(model, self.plan, self.precision)
        self.module = module_prep.prepare_module(
            model, self.precision, self.mesh, self.device, dont_change_device
        )
        build.mark_autocast(self)
        self.param_names = {param: name for name, param in model.named_parameters()}
        self.residency = self._shard_params()
        self._set_up_topology()
        self.observers = build_observers(self)
        given = training_data is not None
        self.training_dataloader = self.deepspeed_io(training_data) if given else None
        self.basic_optimizer = build.build_basic_optimizer(
            self._config, model, optimizer, model_parameters
        )
        self.optimizer, self.driver = build.wrap_optimizer(self)
        self.lr_scheduler = build.build_scheduler(
            self._config, self.client_lr_scheduler, self.basic_optimizer, self.optimizer
        )
        self._set_up_backward()
        self.checkpoint_engine = build.build_checkpoint_engine(self._config)
        ownership.claim(self)
        self._log_configuration()

    # - construction

    def _set_up_topology(self) -> None:
        mesh, world, data = self.mesh, self.mesh.world, self.mesh.data
        self.global_rank, self.world_size = world.ranks[world.rank], world.size
        self.dp_world_size, self.seq_dp_world_size = mesh.data.size, mesh.sequence_data.size
        self.mp_world_size, self.sequence_parallel_size = mesh.tensor.size, mesh.sequence.size
        self.checkpoint_mp_rank = mesh.tensor.rank
        self.data_parallel_group = groups.group_of(data)
        self.seq_parallel_group = mesh.sequence.group
        self.seq_data_parallel_group = mesh.sequence_data.group
        self.expert_parallel_group = {name: axis.group for name, axis in mesh.expert.items()}
        self.expert_data_parallel_group = {
            name: axis.group for name, axis in mesh.expert_data.items()
        }
        self._share_expert_grads()
        self.pipeline_parallelism = False
        self.save_non_zero_checkpoint = mesh.sequence_data.rank == 0
        self.save_zero_checkpoint = self.plan.stage > 0
        self.loaded_checkpoint_mp_world_size = self.loaded_checkpoint_dp_world_size = None
        self.sparse_tensor_module_names = row_names(self)
        self.moe_layers = module_prep.moe_layers(self.module)
        self.gate_modules = [layer.gate for layer in self.moe_layers if hasattr(layer, "gate")]
        self.losses = self.compression_scheduler = self.quantizer = None
        self.block_eigenvalue: dict[int, tuple[float, int]] | None = None
        forward_kwargs.build_techniques(self)

    def _set_up_backward(self) -> None:
        self.watch = BackwardWatch(self.clock, self.driver)
        if self.optimizer is not None:
            self.watch.watch_params(self.module.parameters())
        if (reducer := getattr(self.optimizer, "reducer", None)) is not None:
            reducer.before_first_grad = self.watch.on_stray_grad
            self.watch.on_output = reducer.note_outermost
        self._products = products_context(self.module, self.device, {self.precision.autocast})
        self._module_hooks: list[Any] = []
        self._hook_module(lambda method: lambda *given: method(*given))
        compressing.start(self)

    def _hook_module(self, wrap: Any) -> None:
        # in functions, which a copy of the module shares; with methods it would copy the engine
        before, after = wrap(self._before_module), wrap(self._after_module)
        for hook in self._module_hooks:
            hook.remove()
        self._module_hooks = [
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        ]

    def _log_configuration(self) -> None:
        self.observers.progress(self, 0)
        if self.global_rank == 0:
            self._config.print("DeepSpeedEngine configuration")
        if self._config.dump_state and self.global_rank == 0:
            for name in sorted(k for k in vars(self) if not k.startswith("_")):
                print(f"  {name} {getattr(self, name)!r}")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}'"
            ) from None

    # - forward

    def _before_module(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        fp16 = self._config.float16_config
        casts = fp16.enabled and fp16.auto_cast and module is self.module
        return (module_prep.cast_inputs(args, torch.float16), kwargs) if casts else None

    def _after_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        trained = self.basic_optimizer is not None and module is self.module and module.training
        if trained and torch.is_grad_enabled():
            self.watch.watch_outputs(output)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module, in the precision that was configured; returns what it returns."""
        if getattr(self.optimizer, "offloaded_states", None):
            offload_states.refuse_use(self.optimizer)
        if self.module.training:
            kwargs = forward_kwargs.with_techniques(self, kwargs)
        self.watch.note_forward()
        with (
            self.observers.during("forward", self),
            self._products,
            self.precision.forward_context(self.device),
            self._around_graphs(),
        ):
            return self.module(*inputs, **kwargs)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        """Put the module in training mode."""
        self.training = mode
        self.module.train(mode)

    def eval(self) -> None:  # type: ignore[override]
        """Put the module in evaluation mode."""
        self.train(False)

    # - backward

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss multiplied by the loss scale, for a plain `.backward()` on the result.

        Raises:
            AssertionError: if `loss` is no scalar with a graph, or there is no optimizer.
        """
        module_prep.check_loss(loss, self.basic_optimizer)
        self.watch.note_scaled()
        return self.driver.scale(loss)

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **_: Any
    ) -> torch.Tensor:
        """Back-propagate one micro-batch's loss and reduce gradients where that is due.

        Args:
            loss: 0-dim (or one-element) tensor with a graph.
            retain_graph: as in torch.
            scale_wrt_gas: divide the loss by the number of accumulated micro-batches.

        Returns:
            The loss as it counts in the accumulation, without the fp16 loss scale.

        Raises:
            AssertionError: if `loss` is no scalar with a graph, or there is no optimizer.
        """
        module_prep.check_loss(loss, self.basic_optimizer)
        steps = self.clock.accumulation if scale_wrt_gas and self.clock.managed else 1
        share = loss / steps if steps > 1 else loss
        with self.observers.during("backward", self), self.watch.engine_backward():
            self.driver.scale(share).backward(retain_graph=retain_graph)
        self.observers.saw_loss(self, share)
        return share

    def allreduce_gradients(self, bucket_size: int = 500_000_000) -> None:
        """Reduce gradients now (for loops that turn `enable_backward_allreduce` off)."""
        self.driver.reduce_now()

    def _backward_epilogue(self) -> None:
        """Kept for callers: the end of a plain `loss.backward()` is noticed as it happens."""

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only add gradients up on this rank; legal at every ZeRO stage."""
        with self.clock.no_sync():
            yield

    @contextlib.contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Reduce once, at the end, whatever the number of backward passes inside."""
        build_checks.check_coalescing(self)
        with self.clock.no_sync():
            yield
        if self.driver.reduces_each_backward or self.clock.at_boundary:
            self.driver.reduce_now()

    @property
    def inside_no_sync_ctxt(self) -> bool:
        return self.clock.unsynchronized

    @property
    def enable_backward_allreduce(self) -> bool:
        return self.watch.allreduce_enabled

    @enable_backward_allreduce.setter
    def enable_backward_allreduce(self, value: bool) -> None:
        self.watch.allreduce_enabled = value

    # - step

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch completes an accumulation."""
        return self.clock.at_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Fix what `is_gradient_accumulation_boundary` says until further notice."""
        self.clock.force_boundary(is_boundary)

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed the weights."""
        return self.clock.applied

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """At an accumulation boundary: clip, step the optimizer and the scheduler, zero the gradients.

        Args:
            lr_kwargs: keyword arguments for the scheduler's `step`.
        """
        with self.clock.inside_step():
            boundary = self.clock.at_boundary
            with self.observers.during("step", self):
                if boundary:
                    self._take_model_step(lr_kwargs or {})
            self.observers.after_step(self, boundary)

    def _take_model_step(self, lr_kwargs: dict[str, Any]) -> None:
        applied = forward_kwargs.take_step(self)
        self.clock.applied = applied
        if applied and self.lr_scheduler is not None:
            build.step_scheduler(self.lr_scheduler, lr_kwargs, self.train_batch_size())
        self.observers.progress(self, self.global_steps + 1)
        batch = self.train_batch_size()
        self.clock.count_step(batch, batch // self.gradient_accumulation_steps(), not applied)
        self.checkpoint_engine.at_boundary(self.mesh.world)

    def zero_grad(self) -> None:  # type: ignore[override]
        """Set every parameter's gradient to None, and forget what has been reduced."""
        self.driver.zero_grad()
        for param in self.module.parameters():
            param.grad = None

    def get_global_grad_norm(self) -> Any:
        """The 2-norm of the last step's gradients before clipping; None before the first, and where fp32 neither shards nor clips."""
        return self.driver.grad_norm

    # - data and batch sizes

    def set_lr_scheduler(self, scheduler: Any) -> None:
        """Have `step()` drive `scheduler`."""
        self.lr_scheduler = scheduler

    # - checkpoints

    def save_checkpoint(
        self,
        save_dir: Any,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save model, optimizer, scheduler and counters under `save_dir/tag`; every rank must call it."""
        return engine_checkpoint.save_checkpoint(
            self, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters
        )

    def load_checkpoint(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load what `save_checkpoint` saved; `(None, None)` where there is nothing."""
        self.checkpoint_engine.finish()
        return engine_load.load_checkpoint(
            self,
            load_dir,
            tag,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )

    def save_16bit_model(
        self,
        save_dir: Any,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save the module's weights alone, in one file; every rank must call it."""
        return engine_checkpoint.save_16bit_model(
            self, save_dir, save_filename, exclude_frozen_parameters
        )

    def save_fp16_model(self, save_dir: Any, save_filename: str = "pytorch_model.bin") -> bool:
        """Older name of `save_16bit_model`."""
        return self.save_16bit_model(save_dir, save_filename)

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The module's state dict, without frozen parameters if asked."""
        return engine_checkpoint.module_state_dict(
            self, destination, prefix, keep_vars, exclude_frozen_parameters
        )

    def load_module_state_dict(
        self, checkpoint: dict[str, Any], strict: bool = True, **options: Any
    ) -> None:
        """Load `checkpoint['module']` into the module."""
        engine_load.load_module_state_dict(self, checkpoint, strict=strict, **options)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        return engine_checkpoint.consolidated_16bit_state_dict(self, exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        if self.plan.stage != 3:
            raise ValueError(f"this function requires ZeRO-3 mode, not stage {self.plan.stage}")
        return self._consolidated_16bit_state_dict(exclude_frozen_parameters)

    # - lifetime

    def offload_states(
        self,
        include: Any = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move states out of the device's memory until `reload_states`; see `runtime.zero.offload_states`."""
        offload_states.offload_states(
            module_prep.need_sharded(self.optimizer), include, device, pin_memory, non_blocking
        )

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` moved."""
        offload_states.reload_states(module_prep.need_sharded(self.optimizer), non_blocking)

    def empty_partition_cache(self) -> None:
        """Let go of all sharded parameters that are whole (stage 3)."""
        if self.residency is not None:
            self.residency.release_all()

    def destroy(self) -> None:
        """Complete a save on its way, and remove all hooks from the module and its parameters."""
        self.checkpoint_engine.cleanup()
        self._set_deepcompile_active(False)
        self.driver.destroy()
        self._products.release()
        self.watch.remove_hooks()
        for hook in self._module_hooks:
            hook.remove()
        self._module_hooks = []
