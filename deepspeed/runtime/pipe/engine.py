# SPDX-License-Identifier: Apache-2.0
"""The engine of a pipeline: runs the instructions of a schedule, stage by stage."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.forward_kwargs import count_tokens
from deepspeed.runtime.utils import move_to_device
from deepspeed.utils.errors import explain

from . import p2p, schedule
from .module import PipelineError, PipelineModule


class PipelineEngine(DeepSpeedEngine):
    """Trains a `PipelineModule`: `train_batch` and `eval_batch` in place of forward, backward and step.

    Args:
        *super_args, **super_kwargs: as of `DeepSpeedEngine`.

    Raises:
        AssertionError: ZeRO stage 2 or 3, or accumulation managed by the caller.
    """

    module: PipelineModule

    def __init__(
        self, *super_args: Any, has_bool_tensors: bool = False, **super_kwargs: Any
    ) -> None:
        super().__init__(*super_args, **super_kwargs)
        self._refuse_what_does_not_go()
        module = self.module
        self.has_bool_tensors, self.pipeline_parallelism = has_bool_tensors, True
        self.grid = module.mpu()
        self.num_stages, self.stage_id = self.grid.pipe_parallel_size, self.grid.get_stage_id()
        self.prev_stage, self.next_stage = self.stage_id - 1, self.stage_id + 1
        self.micro_batch_size = self.train_micro_batch_size_per_gpu()
        self.micro_batches = self.gradient_accumulation_steps()
        interval = int(self._config.pipeline["activation_checkpoint_interval"] or 0)
        if interval > 0:
            module.set_checkpoint_interval(interval)
        if not self._config.pipeline["use_reentrant"]:
            module.activation_checkpoint_func = checkpointing.non_reentrant_checkpoint
        varying = module.dynamic_shape
        self._before = self._channels(self.prev_stage, varying) if not self.is_first_stage() else ()
        self._after = self._channels(self.next_stage, varying) if not self.is_last_stage() else ()
        self._tied = [weight for weight, _ in module.tied_trainable()]
        for weight in self._tied:
            weight.ds_grad_is_ready = False  # taken when the stages' gradients have been added up
        self.batch_fn: Callable[[Any], Any] | None = None
        self.data_iterator: Iterator[Any] | None = None
        self.loss_model = module.loss_fn
        self._buffers: list[dict[str, Any]] = []
        self._losses: list[Tensor] = []
        self._outputs: list[Any] = []
        self._more_losses: OrderedDict[str, Tensor] = OrderedDict()
        self._at_boundary = False
        self.agg_train_loss: Tensor | None = None
        self._since = time.perf_counter()
        if self.training_data is not None:
            self._build_data_iter(self.training_data)

    def _refuse_what_does_not_go(self) -> None:
        problem = None
        if self.plan.stage > 1:
            problem = f"ZeRO stage {self.plan.stage}, expected 0 or 1"
        elif not self._config.managed_gradient_accumulation:
            problem = (
                "managed_gradient_accumulation: false, not supported with pipeline parallelism"
            )
        elif self.precision.autocast is torch.float16:
            problem = "torch_autocast in fp16, whose loss scale the stages do not share (use bfloat16, or 'fp16')"
        elif self.progressive_layer_drop is not None:
            problem = "progressive_layer_drop, of which a pipeline's layers cannot be told"
        elif self.module.mpu().get_slice_parallel_world_size() > 1:
            problem = (
                "a topology with a 'model' axis longer than 1, over which norms are not combined"
            )
        if problem is not None:
            raise AssertionError(
                explain(
                    "pipeline parallelism does not go with the configuration",
                    got=problem,
                    fix="change the configuration, or train without a PipelineModule",
                )
            )

    def _channels(self, stage: int, varying: bool) -> tuple[p2p.Channel, p2p.Channel]:
        """For activations and for gradients."""
        peer = self.grid.stage_to_global(stage)
        return (
            p2p.Channel(peer, self.device, varying),
            p2p.Channel(peer, self.device, varying),
        )

    def _build_data_iter(self, dataset: Any) -> None:
        sampler = torch.utils.data.distributed.DistributedSampler(
            dataset, num_replicas=self.dp_world_size, rank=self.mesh.data.rank, shuffle=False
        )
        self.training_dataloader = RepeatingLoader(self.deepspeed_io(dataset, data_sampler=sampler))
        self.set_dataloader(self.training_dataloader)

    # - the public calls

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Train on `gradient_accumulation_steps` micro-batches and step. Collective of all ranks.

        Args:
            data_iter: yields `(inputs, labels)`; first and last stages read it. None for the engine's own.

        Returns:
            0-dim mean loss over micro-batches and data-parallel ranks, on every rank.

        Raises:
            RuntimeError: gradients are off.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "train_batch() requires gradients enabled. Use eval_batch() instead."
            )
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        count_tokens(self)
        # before a batch_fn cuts batches to the step's length
        if self.curriculum_scheduler_legacy is not None:
            self.curriculum_scheduler_legacy.update_difficulty(self.global_steps + 1)
        self._start()
        with self.clock.no_sync():
            self._exec_schedule(
                schedule.TrainSchedule(self.micro_batches, self.num_stages, self.stage_id)
            )
        self.agg_train_loss = self._mean_loss("avg", self.micro_batches, True)
        self.observers.saw_loss(self, self.agg_train_loss)
        self._reduce_and_step()
        self._report()
        return self.agg_train_loss

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Compute the loss, or the outputs, without gradients; leaves the module in eval mode.

        Args:
            data_iter: yields `(inputs, labels)`; first and last stages read it.
            return_logits: return the last stage's outputs, too.
            compute_loss: False where there are no labels: the outputs are returned in place of the loss.
            reduce_output: "avg" or "sum" over micro-batches (and the mean over data-parallel ranks), or None.
            bcast_loss: give the loss to all stages.
            num_micro_batches: how many; by default as many as a training batch has.

        Returns:
            The loss; with `return_logits` a pair of it and the outputs, which other stages than the last see as None.
        """
        self.module.eval()
        train_iterator, self.data_iterator = self.data_iterator, data_iter
        count = num_micro_batches or self.micro_batches
        self._start(compute_loss)
        self._with_outputs = return_logits or not compute_loss
        try:
            with torch.no_grad():
                self._exec_schedule(
                    schedule.InferenceSchedule(count, self.num_stages, self.stage_id)
                )
        finally:
            self.data_iterator = train_iterator
        result = self._mean_loss(reduce_output, count, bcast_loss) if compute_loss else None
        outputs = _joined(self._outputs) if self.is_last_stage() else None
        self._outputs = []
        if return_logits:
            return result, outputs
        return result if compute_loss else outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise PipelineError("Only train_batch() is accessible in pipeline mode.")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        raise PipelineError("Only train_batch() is accessible in pipeline mode.")

    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise PipelineError("Only train_batch() is accessible in pipeline mode.")

    def is_first_stage(self) -> bool:
        """Whether this rank has the first layers."""
        return self.stage_id == 0

    def is_last_stage(self) -> bool:
        """Whether this rank has the last layers."""
        return self.stage_id == self.num_stages - 1

    def get_pipeline_parallel_rank(self) -> int:
        """This rank's stage."""
        return self.stage_id

    def set_dataloader(self, loader: Any) -> None:
        """Read training batches from `loader`; ignored by stages that read none."""
        if self.is_first_stage() or self.is_last_stage():
            self.training_dataloader = loader
            self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Read training batches from `iterator`; ignored by stages that read none."""
        if self.is_first_stage() or self.is_last_stage():
            self.training_dataloader, self.data_iterator = None, iterator

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Pass each micro-batch through `fn`."""
        self.batch_fn = fn

    def set_has_attention_mask(self, value: bool) -> None:
        """Kept for callers: any dtype may be sent."""
        self.has_attention_mask = value

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch size by changing the number of micro-batches."""
        super().set_train_batch_size(train_batch_size)
        self.micro_batches = self.gradient_accumulation_steps()

    def reset_activation_shape(self) -> None:
        """Kept for callers: shapes may change from batch to batch."""
        for channel in (*self._before, *self._after):
            channel.reset()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether gradients are being reduced, or a step is being taken."""
        return self._at_boundary

    def get_additional_losses(self) -> Mapping[str, Tensor] | None:
        """The means of the losses that the module's own `get_additional_losses` named, in the last training batch."""
        return self._more_losses or None

    def log_for_device(self, *msg: Any) -> None:
        """Print with this rank's place."""
        print(f"RANK={self.global_rank} PIPE-ID={self.stage_id}", *msg, flush=True)

    # - checkpoints

    def module_state_dict(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Layers have files of their own."""
        return None

    def layer_files(self, exclude_frozen_parameters: bool = False) -> Mapping[str, dict[str, Any]]:
        """The files of this rank's layers: name -> content; empty where another rank writes them."""
        if not self.checkpoint_engine.is_data_parallel_writer(self.grid.data_parallel_id):
            return {}
        return self.module.layer_states(exclude_frozen_parameters)

    # - instructions

    def _start(self, with_loss: bool = True) -> None:
        self._with_loss, self._with_outputs = with_loss, False
        self._losses, self._outputs = [], []
        self._more_losses = OrderedDict()
        self.reset_activation_shape()

    def _exec_schedule(self, steps: schedule.PipeSchedule) -> None:
        self._buffers = [{} for _ in range(steps.num_pipe_buffers())]
        for instructions in steps:
            for instruction in instructions:
                run = _RUNS.get(type(instruction))
                if run is not None:
                    run(self, self._buffers[instruction.buffer_id])
        self._buffers = []

    def _reentrant_activation_checkpointing(self) -> bool:
        module = self.module
        non_reentrant = checkpointing.non_reentrant_checkpoint
        return (
            module.activation_checkpoint_interval > 0
            and module.activation_checkpoint_func is not non_reentrant
        )

    def _load_micro_batch(self, buffer: dict[str, Any]) -> None:
        if self.data_iterator is None:
            raise RuntimeError(
                explain(
                    "a pipeline's batch needs data",
                    got="no iterator on a stage that reads batches",
                    fix="pass data_iter, or training_data to deepspeed.initialize",
                )
            )
        batch = next(self.data_iterator)
        batch = batch if self.batch_fn is None else self.batch_fn(batch)
        if self.is_first_stage():
            inputs = _to(batch[0], self.device)
            if self._reentrant_activation_checkpointing():
                inputs = _wanting_grads(inputs)  # it needs an input that wants a gradient
            buffer["inputs"] = inputs
        if self.is_last_stage():
            buffer["labels"] = _to(batch[1], self.device) if len(batch) > 1 else None

    def _forward_pass(self, buffer: dict[str, Any]) -> None:
        outputs = super().forward(_editable(buffer["inputs"]))
        buffer["outputs"] = outputs
        if not self.is_last_stage():
            return
        loss = outputs
        if self._with_outputs:
            self._outputs.append(outputs)
        if not self._with_loss:
            return
        if self.loss_model is not None:
            with self.precision.forward_context(self.device):
                loss = self.loss_model(outputs, buffer["labels"])
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise ValueError(
                explain(
                    "a pipeline's loss must be a scalar",
                    got=f"{type(loss).__name__} {tuple(getattr(loss, 'shape', ()))}",
                    expected="a 0-dim tensor from loss_fn(outputs, labels)",
                )
            )
        buffer["outputs"] = loss
        self._losses.append(loss.detach().float())
        for name, value in (self.module.get_additional_losses() or {}).items():
            shown = value.detach().float() / self.micro_batches
            self._more_losses[name] = self._more_losses.get(name, 0.0) + shown

    def _backward_pass(self, buffer: dict[str, Any]) -> None:
        with self.observers.during("backward", self), self.watch.engine_backward():
            if self.is_last_stage():
                self.driver.scale(buffer["outputs"] / self.micro_batches).backward()
            else:
                pairs = [t for t in p2p.pack(buffer["outputs"]) if t.requires_grad]
                torch.autograd.backward(pairs, grad_tensors=buffer["output_grads"])
        buffer["outputs"] = buffer["output_grads"] = None

    def _send_activations(self, buffer: dict[str, Any]) -> None:
        outputs = buffer["outputs"]
        self._after[0].send(p2p.pack(outputs), isinstance(outputs, (tuple, list)))

    def _receive_activations(self, buffer: dict[str, Any]) -> None:
        received = self._before[0].receive()
        if not torch.is_grad_enabled():
            received = [tensor.detach() for tensor in received]
        buffer["inputs"] = p2p.unpack(received, self._before[0].is_tuple)

    def _send_grads(self, buffer: dict[str, Any]) -> None:
        wanted = [t for t in p2p.pack(buffer["inputs"]) if t.requires_grad]
        self._before[1].send([torch.zeros_like(t) if t.grad is None else t.grad for t in wanted])
        buffer["inputs"] = None

    def _receive_grads(self, buffer: dict[str, Any]) -> None:
        buffer["output_grads"] = self._after[1].receive()

    # - the end of a batch

    def _reduce_and_step(self) -> None:
        self._at_boundary = True
        try:
            self.module.allreduce_tied_weight_gradients()
            reducer = getattr(self.optimizer, "reducer", None)
            for weight in self._tied:
                weight.ds_grad_is_ready = True
                if reducer is not None:
                    reducer.take(weight)
                weight.ds_grad_is_ready = False
            self.driver.reduce_now()
            self.clock.micro_steps += self.micro_batches - 1
            self.clock.force_boundary(True)  # whatever the number of micro-batches was before
            super().step()
        finally:
            self._at_boundary = False
            self.clock.forced_boundary = None

    def _mean_loss(self, reduce: str | None, count: int, broadcast: bool) -> Any:
        """The loss of all micro-batches, averaged over data-parallel ranks; from the last stage to all."""
        if reduce is None:
            return self._losses if self.is_last_stage() else None
        if reduce not in ("avg", "sum"):
            raise NotImplementedError(
                explain("unknown reduction", got=repr(reduce), expected="'avg', 'sum' or None")
            )
        total = torch.zeros((), device=self.device)
        if self.is_last_stage():
            total = torch.stack([loss.reshape(()) for loss in self._losses]).sum()
            if reduce == "avg":
                total = total / count
            if self.dp_world_size > 1:
                dist.all_reduce(total, group=self.mesh.data.group)
                total = total / self.dp_world_size
        if broadcast and self.num_stages > 1:
            source = self.grid.stage_to_global(self.num_stages - 1)
            dist.broadcast(total, src=source, group=self.grid.get_pipe_parallel_group())
        return total

    def _report(self) -> None:
        now = time.perf_counter()
        taken, self._since = now - self._since, now
        every = self.steps_per_print()
        if self.global_rank == 0 and every and self.global_steps % every == 0:
            loss = float(self.agg_train_loss) if self.agg_train_loss is not None else 0.0
            print(
                f"steps: {self.global_steps} loss: {loss:0.4f} iter time (s): {taken:0.3f} "
                f"samples/sec: {self.train_batch_size() / taken:0.3f}",
                flush=True,
            )


_RUNS: dict[type, Callable[[PipelineEngine, dict[str, Any]], None]] = {
    schedule.LoadMicroBatch: PipelineEngine._load_micro_batch,
    schedule.ForwardPass: PipelineEngine._forward_pass,
    schedule.BackwardPass: PipelineEngine._backward_pass,
    schedule.SendActivation: PipelineEngine._send_activations,
    schedule.RecvActivation: PipelineEngine._receive_activations,
    schedule.SendGrad: PipelineEngine._send_grads,
    schedule.RecvGrad: PipelineEngine._receive_grads,
}


def _to(value: Any, device: torch.device) -> Any:
    """On the device; a list becomes a tuple, as what goes from layer to layer is."""
    if isinstance(value, (tuple, list)):
        return tuple(_to(item, device) for item in value)
    return move_to_device(value, device)


def _wanting_grads(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.is_floating_point() else value
    return tuple(_wanting_grads(item) for item in value)


def _editable(value: Any) -> Any:
    """The same with copies of leaves that want gradients, which a first layer could not change in place."""
    if isinstance(value, Tensor):
        return value.clone() if value.requires_grad and value.is_leaf else value
    return tuple(_editable(item) for item in value) if isinstance(value, tuple) else value


def _joined(outputs: Any) -> Any:
    """Outputs of several micro-batches along the batch; those that are no tensors as a list."""
    if outputs and all(isinstance(output, Tensor) for output in outputs):
        return torch.cat(outputs)
    return outputs
