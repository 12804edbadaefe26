# SPDX-License-Identifier: Apache-2.0
"""Turns a parsed configuration into the frozen objects that the engine runs on: Mesh, Plan, Precision, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.utils.errors import DeepSpeedConfigError, explain

from .build_order import plan_for_order, set_order, super_offloads
from .drivers import Driver, NoDriver, PlainDriver, SlabDriver
from .fp16.loss_scaler import DynamicLossScaler, LossScaler, LossScalerBase, UnguardedLossScaler
from .module_prep import named_strays
from .precision import Precision
from .sharding import spill_folder
from .sparse_gradients import row_layers
from .torch_autocast import forget_autocast_params, init_autocast_params
from .zero.optimizer import ZeroOptimizer, expert_group_name
from .zero.parameter_offload import DeepSpeedZeRoOffload
from .zero.plan import Plan, TierKind
from .zero.quantized_sum import LOCO_KEEP, LOCO_PERIOD

# Elements of states that are in memory at once when they live in files, whatever larger sub_group_size says.
LARGEST_FILE_PART = 32 * 1024 * 1024


def divide_layers(config: Any, model: torch.nn.Module, mesh: Mesh, device: torch.device) -> None:
    """Divide the model's layers over tensor-parallel ranks, where that is asked for; its inputs are compared once."""
    section = config.tensor_parallel_config
    if section.autotp_size > 1:
        from .tensor_parallel.division import check_inputs_once, divide_model

        divide_model(model, section, mesh.tensor, mesh.tensor.group, device)
        check_inputs_once(model, mesh.tensor)


def build_precision(config: Any) -> Precision:
    """The dtypes that the configuration asks for."""
    fp16, bf16 = config.float16_config, config.bfloat16_config
    compute = torch.float16 if fp16.enabled else torch.bfloat16 if bf16.enabled else None
    low_master = (fp16.enabled and fp16.fp16_master_weights_and_grads) or (
        bf16.enabled and bf16.bf16_master_weights_and_grads
    )
    autocast = None
    if config.torch_autocast_enabled:
        autocast = config.torch_autocast_dtype or torch.bfloat16
    sharded = config.zero_optimization_stage > 0
    scaled = fp16.enabled or (sharded and autocast is torch.float16)
    return Precision(
        compute=compute,
        accumulate=config.grad_accum_dtype,
        reduce=config.communication_data_type,
        low_precision_master=low_master,
        buffers=config.buffer_dtype,
        autocast=autocast,
        check_overflow=scaled or (bf16.enabled and bf16.check_grad_overflow),
        take_overflow=bf16.enabled and not bf16.check_grad_overflow,
        make_scaler=_scaler_factory(fp16, sharded) if scaled else LossScaler,
    )


def mark_autocast(engine: Any) -> None:
    """Have gradients of the modules that autocast computes low travel in its dtype."""
    forget_autocast_params(engine.module)  # an earlier engine's of the same model
    if engine.precision.autocast is not None:
        names = engine._config.torch_autocast_lower_precision_safe_modules
        init_autocast_params(engine.module, engine.precision.autocast, names)


def _scaler_factory(fp16: Any, sharded: bool) -> Callable[[], LossScalerBase]:
    if not fp16.enabled:
        # What torch.amp.GradScaler does, which scales where states are not sharded.
        return partial(UnguardedLossScaler, 2.0**16, 2000, 2.0**-24)
    if fp16.loss_scale != 0:
        return partial(LossScaler, fp16.loss_scale)
    if not sharded:
        return partial(
            UnguardedLossScaler,
            2.0**fp16.initial_scale_power,
            fp16.loss_scale_window,
            fp16.min_loss_scale,
        )
    return partial(
        DynamicLossScaler,
        init_scale=2.0**fp16.initial_scale_power,
        scale_window=fp16.loss_scale_window,
        min_scale=fp16.min_loss_scale,
        delayed_shift=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )


def build_plan(config: Any, sequence_ranks: int = 1) -> Plan:
    """The ZeRO row that the configuration asks for."""
    zero = config.zero_config
    plan = replace(
        Plan.for_stage(int(zero.stage)),
        reduce_bucket_numel=int(zero.reduce_bucket_size),
        overlap_reduce=bool(zero.overlap_comm),
        round_robin=zero.round_robin_gradients,
        gradient_op=config.gradient_allreduce_op,
        every_gradient=not config.zero_config.ignore_unused_parameters,
        prescale=config.prescale_gradients,
        predivide_factor=config.gradient_predivide_factor,
    )
    if plan.stage < 3:
        # Upstream's averages: at stage 3 over all ranks, below it over those with different samples only.
        plan = replace(plan, summed_ranks=sequence_ranks)
    if plan.stage == 3 and zero.zero_quantized_gradients:
        plan = replace(plan, gradient_bits=4, error_feedback=_error_feedback(zero))
    offload = zero.offload_optimizer
    place = "none" if plan.stage == 0 or offload is None else _name(offload.device)
    if place == "cpu":
        plan = plan.on_host(offload.ratio, offload.pin_memory)
        plan = plan_for_order(zero, plan)
    if place == "nvme":
        numel = min(int(zero.sub_group_size) or 1, LARGEST_FILE_PART)
        plan = replace(
            plan.on_host(1.0, offload.pin_memory), state_tier=TierKind.FILE, part_numel=numel
        )
    if plan.stage == 3 and zero.offload_param is not None:
        tiers = {"cpu": TierKind.HOST, "nvme": TierKind.FILE}
        plan = replace(
            plan, param_tier=tiers.get(_name(zero.offload_param.device), TierKind.DEVICE)
        )
    return plan


def _error_feedback(zero: Any) -> tuple[float, int] | None:
    """The settings of LoCo, where they are given.

    Raises:
        DeepSpeedConfigError: unknown keys, or values that cannot be.
    """
    given = zero.zeropp_loco_param
    if given is None:
        return None
    beta, period = given.get("err_beta", LOCO_KEEP), given.get("reset_T", LOCO_PERIOD)
    known = set(given) <= {"err_beta", "reset_T"}
    if not (known and 0.0 <= beta < 1.0 and isinstance(period, int) and period >= 1):
        raise DeepSpeedConfigError(
            explain(
                "'zero_optimization.zeropp_loco_param' is not understood",
                got=given,
                expected='{"err_beta": from 0 to below 1, "reset_T": a positive integer}',
            )
        )
    return float(beta), period


def _name(device: Any) -> str:
    return str(getattr(device, "value", device))


# - optimizer


def build_basic_optimizer(
    config: Any, model: torch.nn.Module, client: Any, model_parameters: Any
) -> torch.optim.Optimizer | None:
    """The optimizer before any sharding: the caller's, or the configuration's; None without either.

    Raises:
        ValueError: if it holds a parameter that is not the model's.
        AssertionError: unknown type, a parameter given twice, or a type that ZeRO is not known to serve.
    """
    from .optimizers import check_served, make_optimizer

    if isinstance(client, torch.optim.Optimizer):
        optimizer: Any = client
    elif client is not None and callable(client):
        optimizer = client(_params(model, model_parameters))
    elif config.optimizer_name is not None:
        optimizer = make_optimizer(config, _params(model, model_parameters))
    else:
        return client
    _check_params(optimizer, model)
    check_served(config, optimizer, is_client=client is not None)
    return optimizer


def _params(model: torch.nn.Module, given: Any) -> list[Any]:
    params = list(model.parameters() if given is None else given)
    return params or list(model.parameters())


def _check_params(optimizer: Any, model: torch.nn.Module) -> None:
    strays = named_strays(optimizer, model.parameters())
    if strays:
        index, shape = strays[0]
        raise ValueError(
            explain(
                "the optimizer holds parameters that are not the model's",
                got=f"{len(strays)} of them, the first of shape {tuple(shape)} in group {index}",
                expected="only parameters of the model given to initialize",
                fix="make the optimizer from model.parameters() of that very model",
            )
        )
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad and getattr(param, "ds_codec", None) is not None:
                raise ValueError(
                    explain(
                        "quantized weights cannot be trained",
                        got=f"a trainable weight of shape {tuple(param.ds_shape)} that 'weight_quantization' names",
                        expected="requires_grad=False, or full weights",
                        fix="freeze it (and train adapters), or remove 'weight_quantization'",
                    )
                )
            if id(param) in seen:
                raise AssertionError(
                    explain(
                        "a parameter occurs twice in the optimizer's groups",
                        got=f"a parameter of shape {tuple(param.shape)}",
                        expected="each parameter in one group, once",
                    )
                )
            seen.add(id(param))


def wrap_optimizer(engine: Any) -> tuple[Any, Driver]:
    """What `engine.optimizer` is, and what the engine drives it with.

    Raises:
        NotImplementedError: stage 0 with gradients that add up in another dtype than the model's.
    """
    from .optimizers import join_ranks

    basic, config, plan = engine.basic_optimizer, engine._config, engine.plan
    join_ranks(basic, engine.mesh)
    if basic is None:
        if engine.residency is None:
            return None, NoDriver()
        return DeepSpeedZeRoOffload(engine.residency), NoDriver(engine.residency)
    model_dtype, grad_dtype = engine.get_data_types()
    if plan.stage == 0 and model_dtype != grad_dtype:
        raise NotImplementedError(
            explain(
                "stage 0 accumulates gradients in the model's dtype only",
                got=f"model {model_dtype}, data_types.grad_accum_dtype {grad_dtype}",
                expected="equal dtypes, or a ZeRO stage of 1 or more",
                fix="set zero_optimization.stage to 1",
            )
        )
    if plan.stage == 0 and engine.precision.compute is None:
        return basic, _plain_driver(engine)
    kind = _wrapper_class(basic, config, plan, grad_dtype)
    folder = None
    if plan.state_tier is TierKind.FILE:
        folder = spill_folder(config, config.zero_config.offload_optimizer, "optimizer")
    optimizer = kind(
        basic,
        plan,
        engine.precision,
        engine.mesh,
        engine.device,
        clip_grad=config.gradient_clipping,
        param_names=engine.param_names,
        folder=folder,
    )
    if engine.residency is not None:
        optimizer.parameter_offload = DeepSpeedZeRoOffload(engine.residency)
    set_order(engine, optimizer)
    return optimizer, SlabDriver(optimizer, engine.residency)


def _plain_driver(engine: Any) -> PlainDriver:
    config = engine._config
    by_axis: dict[Axis, list[torch.nn.Parameter]] = {}
    for param in engine.module.parameters():
        if param.requires_grad:
            name = expert_group_name(param)
            axis = engine.mesh.sequence_data if name is None else engine.mesh.expert_data[name]
            by_axis.setdefault(axis, []).append(param)
    layers = row_layers(engine.module, config.sparse_gradients_enabled)
    scaler = None
    if engine.precision.autocast == torch.float16:
        scaler = torch.amp.GradScaler(engine.device.type)
    return PlainDriver(
        engine.basic_optimizer,
        list(by_axis.items()),
        engine.plan,
        config.gradient_clipping,
        config.communication_data_type,
        scaler,
        engine.mesh,
        {layer.weight: layer.sparse for layer in layers.values()},
    )


def _wrapper_class(
    basic: Any, config: Any, plan: Plan, grad_dtype: torch.dtype
) -> type[ZeroOptimizer]:
    """The public class of the wrapper; all of them are `ZeroOptimizer` with another row."""
    from deepspeed.ops.adam import FusedAdam

    from .bf16_optimizer import BF16_Optimizer
    from .fp16.fused_optimizer import FP16_Optimizer
    from .fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from .superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
    from .zero.mics import MiCS_Optimizer
    from .zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from .zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if plan.stage == 3:
        mics = config.zero_config.mics_shard_size > 0
        plain = SuperOffloadOptimizer_Stage3 if super_offloads(config.zero_config) else None
        return MiCS_Optimizer if mics else plain or DeepSpeedZeroOptimizer_Stage3
    if plan.stage == 0:
        flat = hasattr(basic, "reduces_itself") and not getattr(basic, "per_param", False)
        return FP16_Optimizer if flat or isinstance(basic, FusedAdam) else FP16_UnfusedOptimizer
    fp32_sums = config.bfloat16_config.enabled and grad_dtype == torch.float32
    if fp32_sums and plan.stage == 1 and plan.state_tier is TierKind.DEVICE:
        return BF16_Optimizer
    return DeepSpeedZeroOptimizer


# - scheduler


def build_scheduler(config: Any, client: Any, basic: Any, wrapped: Any) -> Any:
    """The learning-rate scheduler: the caller's before the configuration's; None without an optimizer.

    Raises:
        AssertionError: unknown type.
    """
    if basic is None:
        return None
    if client is not None:
        return client(basic) if callable(client) else client
    if config.scheduler_name is None:
        return None
    from . import lr_schedules

    if hasattr(lr_schedules, config.scheduler_name):
        kind, target = getattr(lr_schedules, config.scheduler_name), wrapped
    else:
        kind, target = getattr(torch.optim.lr_scheduler, config.scheduler_name, None), basic
    if kind is None:
        known = [*lr_schedules.VALID_LR_SCHEDULES, "a class of torch.optim.lr_scheduler"]
        raise AssertionError(
            explain("unknown scheduler.type", got=config.scheduler_name, expected=", ".join(known))
        )
    return kind(target, **(config.scheduler_params or {}))


def step_scheduler(scheduler: Any, lr_kwargs: dict[str, Any], batch: int) -> None:
    """Advance a scheduler; one that needs an argument is given the batch size."""
    try:
        scheduler.step(**lr_kwargs)
    except TypeError:
        scheduler.step(batch)


# - batch sizes, loader, checkpoints


def resize_batch(config: Any, train_batch_size: int, ranks: int) -> None:
    """Set the global batch size by the number of accumulated micro-batches.

    Raises:
        ValueError: if it is no multiple.
    """
    unit = config.train_micro_batch_size_per_gpu * ranks
    if train_batch_size <= 0 or train_batch_size % unit:
        raise ValueError(
            explain(
                "train_batch_size must be divisible by micro-batch size times data-parallel ranks",
                got=train_batch_size,
                expected=f"a multiple of {unit}",
            )
        )
    config.gradient_accumulation_steps = train_batch_size // unit
    config.train_batch_size = train_batch_size


def build_loader(engine: Any, dataset: Any, **options: Any) -> Any:
    """The loader of `engine.deepspeed_io`."""
    from .data_pipeline.data_sampling.of_engine import add_sampling
    from .dataloader import ROUTE_TRAIN, build_dataloader

    batch_size = options.pop("batch_size") or engine.train_micro_batch_size_per_gpu()
    if options["route"] == ROUTE_TRAIN:
        add_sampling(engine, dataset, batch_size, options)
    return build_dataloader(
        dataset,
        batch_size=batch_size,
        local_rank=engine.local_rank,
        tput_timer=engine.tput_timer,
        data_parallel_world_size=engine.mesh.data.size,
        data_parallel_rank=engine.mesh.data.rank,
        dataloader_drop_last=engine.dataloader_drop_last(),
        **options,
    )


def build_checkpoint_engine(config: Any) -> Any:
    """The object that writes and reads checkpoint files."""
    from .checkpoint_engine.utils import create_checkpoint_engine

    return create_checkpoint_engine(config)
