# SPDX-License-Identifier: Apache-2.0
"""Half precision in one process: scaling, overflow, master weights, accumulation dtypes, non-finite gradients."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from tests.helpers.parity import batch, loss_of, model

FP16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}


def start(stage, net=None, client=None, **extra):
    cfg = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **extra,
    }
    if client is None:
        cfg.setdefault("optimizer", {"type": "AdamW", "params": {"lr": 1e-2}})
    engine, *_ = deepspeed.initialize(
        model=model() if net is None else net, optimizer=client, config=cfg
    )
    return engine


def one_step(engine, dtype, poison=None, micro=0):
    x, y = batch(0, micro, 0, dtype)
    loss = loss_of(engine, x, y)
    if poison is not None:
        loss = loss * poison
    engine.backward(loss)
    engine.step()
    return loss.item()


def weights(engine):
    return [p.detach().clone() for p in engine.module.parameters()]


def unchanged(engine, before):
    return all(torch.equal(a, b) for a, b in zip(weights(engine), before, strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_overflow_skips_the_step_halves_the_scale_and_holds_the_scheduler(stage):
    scheduler = {
        "type": "WarmupLR",
        "params": {"warmup_num_steps": 10, "warmup_type": "linear", "warmup_max_lr": 1.0},
    }
    engine = start(stage, fp16=FP16, scheduler=scheduler)
    before = weights(engine)
    one_step(engine, torch.float16, poison=float("inf"))
    assert unchanged(engine, before)
    assert engine.optimizer.overflow and not engine.was_step_applied()
    assert (engine.skipped_steps, engine.global_steps) == (1, 1)
    assert engine.optimizer.loss_scale == 8.0
    assert engine.lr_scheduler.last_batch_iteration == 0 or engine.get_lr() == [0.0]
    one_step(engine, torch.float16)
    assert not engine.optimizer.overflow and engine.was_step_applied() and engine.skipped_steps == 1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_step_after_a_window_of_clean_ones_doubles_the_scale(stage):
    engine = start(stage, fp16=FP16)
    scales = []
    for poison in (None, None, None, None, None, float("inf"), None, None, None):
        one_step(engine, torch.float16, poison=poison)
        scales.append(engine.optimizer.cur_scale / 16)
    assert scales == [1, 1, 2, 2, 4, 2, 2, 2, 4]


@pytest.mark.parametrize("client", [None, "SGD"])
def test_stage_0_steps_with_gradients_that_the_caller_assigned(client):
    net = model().half()
    rule = None if client is None else torch.optim.SGD(net.parameters(), lr=1.0)
    engine = start(0, net, rule, fp16={**FP16, "loss_scale": 4.0})
    first, *others = engine.module.parameters()
    before = [p.detach().clone() for p in (first, *others)]
    x, y = batch(0, 0, 0, torch.float16)
    engine.backward(loss_of(engine, x, y) * 0.0)
    first.grad = torch.full_like(first, 2.0)
    engine.step()
    assert first.grad is None and not torch.equal(first, before[0])
    if client is not None:
        torch.testing.assert_close(first, before[0] - 0.5)
        assert all(torch.equal(a, b) for a, b in zip(others, before[1:], strict=True))


def back(engine, number, plain):
    x, y = batch(number, 0, 0, torch.bfloat16)
    loss = loss_of(engine, x, y)
    loss.backward() if plain else engine.backward(loss)


@pytest.mark.parametrize("plain", [False, True])
def test_stage_0_shows_gradients_until_the_step(plain):
    net = model().bfloat16()
    engine = start(
        0,
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        bf16={"enabled": True},
        gradient_accumulation_steps=2,
    )
    params = list(net.parameters())
    assert all(p.grad is None for p in params)
    back(engine, 0, plain)
    first = [p.grad.clone() for p in params]
    engine.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, first, strict=True))
    back(engine, 0, plain)  # the same batch: exactly as much again
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(params, first, strict=True))
    slab = engine.optimizer.groups[0].grads()[0]
    assert {p.grad.untyped_storage().data_ptr() for p in params} == {slab.data_ptr()}
    params[0].grad.mul_(0.0)  # edited, forgotten, replaced
    params[1].grad = None
    params[2].grad = torch.ones_like(params[2])
    before = [p.detach().float() for p in params]
    engine.step()
    assert all(p.grad is None for p in params)
    assert torch.equal(params[0].float(), before[0]) and torch.equal(params[1].float(), before[1])
    assert torch.equal(params[2], (before[2] - 1).bfloat16())
    assert torch.equal(params[3], (before[3] - 2 * first[3].float()).bfloat16())


@pytest.mark.parametrize("forget", ["module", "engine"])
def test_stage_0_forgets_gradients_that_are_zeroed(forget):
    engine = start(0, bf16={"enabled": True}, gradient_accumulation_steps=2)
    back(engine, 1, plain=False)
    (engine.module if forget == "module" else engine).zero_grad()
    back(engine, 0, plain=False)
    shown = [p.grad.clone() for p in engine.module.parameters()]
    engine.zero_grad()
    back(engine, 0, plain=False)
    assert all(
        torch.equal(p.grad, g) for p, g in zip(engine.module.parameters(), shown, strict=True)
    )


def test_stage_0_shows_how_it_scales():
    engine = start(0, fp16={**FP16, "min_loss_scale": 4})
    for poison in (None, float("inf"), float("inf"), float("inf")):
        one_step(engine, torch.float16, poison=poison)
    assert engine.optimizer.low_precision_dtype == torch.float16
    shown = engine.optimizer.loss_scale_config
    assert (shown.dynamic_loss_scale, shown.cur_scale, shown.cur_iter) == (True, 4.0, 4)
    assert (shown.scale_window, shown.min_loss_scale, shown.last_overflow_iter) == (2, 4, 3)
    fixed = start(0, fp16={"enabled": True, "loss_scale": 8.0}).optimizer.loss_scale_config
    assert (fixed.dynamic_loss_scale, fixed.cur_scale) == (False, 8.0)


def test_hysteresis_is_spent_before_the_scale_falls():
    engine = start(2, fp16={**FP16, "hysteresis": 2})
    one_step(engine, torch.float16, poison=float("nan"))
    assert engine.optimizer.loss_scale == 16.0
    one_step(engine, torch.float16, poison=float("nan"))
    assert engine.optimizer.loss_scale == 8.0


def test_overflow_at_the_smallest_scale_ends_the_run_sharded_and_not_at_stage_zero():
    fp16 = {**FP16, "initial_scale_power": 0}
    with pytest.raises(RuntimeError, match="Current loss scale already at minimum"):
        one_step(start(1, fp16=fp16), torch.float16, poison=float("inf"))
    one_step(start(0, fp16=fp16), torch.float16, poison=float("inf"))


def test_a_static_scale_never_moves():
    engine = start(2, fp16={"enabled": True, "loss_scale": 32})
    one_step(engine, torch.float16, poison=float("inf"))
    one_step(engine, torch.float16)
    assert engine.optimizer.loss_scale == 32.0 and not engine.optimizer.dynamic_loss_scale


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bf16_skips_steps_that_are_not_finite(stage):
    engine = start(stage, bf16={"enabled": True})
    before = weights(engine)
    one_step(engine, torch.bfloat16, poison=float("nan"))
    assert unchanged(engine, before) and engine.skipped_steps == 1
    one_step(engine, torch.bfloat16)
    assert not unchanged(engine, before)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_bf16_takes_such_steps_where_the_check_is_off(stage, clip):
    bf16 = {"enabled": True, "check_grad_overflow": False}
    engine = start(stage, bf16=bf16, gradient_clipping=clip)
    one_step(engine, torch.bfloat16, poison=float("nan"))
    assert engine.skipped_steps == 0
    assert any(p.isnan().any() for p in engine.module.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_fp32_names_the_parameter_whose_gradient_is_not_finite(stage):
    engine = start(stage)
    before = weights(engine)
    engine.module[2].weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match=r"2\.weight"):
        one_step(engine, torch.float32)
    assert unchanged(engine, before)


def test_fp32_without_slabs_refuses_gradients_that_are_not_finite():
    engine = start(0, gradient_clipping=1.0)
    before = weights(engine)
    with pytest.raises(FloatingPointError, match="not finite"):
        one_step(engine, torch.float32, poison=float("inf"))
    assert unchanged(engine, before)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_plain_backward_in_fp16_needs_scale(stage):
    engine = start(stage, fp16=FP16)
    x, y = batch(0, 0, 0, torch.float16)
    with pytest.raises(RuntimeError, match=r"engine\.scale"):
        loss_of(engine, x, y).backward()
    engine.zero_grad()
    twin = start(stage, fp16=FP16)
    for each, scale in ((engine, True), (twin, False)):
        loss = loss_of(each, x, y)
        each.scale(loss).backward() if scale else each.backward(loss)
        each.step()
    assert unchanged(engine, weights(twin))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_plain_backward_of_the_bare_module_scales_its_fp16_gradients(stage):
    sgd = {
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_allow_untested_optimizer": True,
    }
    engine, twin = (start(stage, fp16=FP16, gradient_accumulation_steps=2, **sgd) for _ in "ab")
    for micro in range(4):
        x, y = batch(0, micro, 0, torch.float16)
        loss_of(engine.module, x, y).backward()
        engine.step()
        twin.backward(loss_of(twin, x, y))
        twin.step()
    for ours, theirs in zip(weights(engine), weights(twin), strict=True):
        # a scale of 16 is exact but for the smallest gradients, which lose bits when it comes late
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "extra", "client", "kind"),
    [
        (0, {"fp16": {"enabled": True}}, None, FP16_Optimizer),
        (0, {"fp16": {"enabled": True}}, torch.optim.SGD, FP16_UnfusedOptimizer),
        (0, {"bf16": {"enabled": True}}, torch.optim.AdamW, FP16_UnfusedOptimizer),
        (0, {}, torch.optim.AdamW, torch.optim.AdamW),
        (
            1,
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            None,
            BF16_Optimizer,
        ),
        (1, {"bf16": {"enabled": True}}, None, DeepSpeedZeroOptimizer),
        (
            2,
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            None,
            DeepSpeedZeroOptimizer,
        ),
        (2, {}, None, DeepSpeedZeroOptimizer),
    ],
)
def test_the_wrapper_has_the_class_that_callers_expect(stage, extra, client, kind):
    net = model()
    client = client(net.parameters(), lr=0.1) if client else None
    assert type(start(stage, net, client, **extra).optimizer) is kind


def test_stage_zero_accumulates_in_its_own_dtype_only():
    with pytest.raises(NotImplementedError, match="grad_accum_dtype"):
        start(0, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})


@pytest.mark.parametrize("stage", [1, 2])
def test_fp32_sums_of_bf16_gradients_do_not_round_in_between(stage):
    """64 equal gradients: in bf16 their sum stops growing at 256 ulps; in fp32 it is exact."""
    net = torch.nn.Linear(4, 1, bias=False)
    count = 1024
    engine = start(
        stage,
        net,
        bf16={"enabled": True},
        data_types={"grad_accum_dtype": "fp32"},
        gradient_accumulation_steps=count,
        optimizer={"type": "SGD", "params": {"lr": 1.0}},
        zero_allow_untested_optimizer=True,
    )
    master = engine.optimizer.groups[0].parts[0].master
    before = master.detach().clone()
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    for _ in range(count):
        engine.backward(engine(x).float().sum())
        engine.step()
    torch.testing.assert_close(
        before[:4] - master[:4].detach(), torch.ones(4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("states", [False, True])
def test_bf16_masters_and_states_take_the_place_of_fp32(stage, states):
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": states}
    engine = start(
        stage,
        bf16=bf16,
        zero_optimization={"stage": stage, "offload_optimizer": {"device": "cpu"}},
    )
    first = one_step(engine, torch.bfloat16)
    for _ in range(5):
        last = one_step(engine, torch.bfloat16)
    assert last < first
    part = engine.optimizer.groups[0].parts[0]
    assert part.master.dtype == torch.bfloat16 and part.low is None
    state = engine.optimizer.state[part.master]
    assert state["exp_avg"].dtype == (torch.bfloat16 if states else torch.float32)


def test_bf16_masters_are_rounded_by_chance_on_request():
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    rule = {"type": "AdamW", "params": {"lr": 1e-2, "stochastic_rounding": True}}
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    engine = start(2, bf16=bf16, optimizer=rule, zero_optimization=offload)
    assert engine.basic_optimizer.stochastic_rounding
    first = one_step(engine, torch.bfloat16)
    for _ in range(5):
        last = one_step(engine, torch.bfloat16)
    assert last < first


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_on_the_host_is_that_of_torch(momentum):
    rule = {"type": "SGD", "params": {"lr": 1e-2, "momentum": momentum}}
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    ours = start(2, optimizer=rule, zero_optimization=offload)
    theirs = start(0, optimizer=rule)
    assert type(ours.basic_optimizer).__name__ == "DeepSpeedCPUSGD"
    theirs.module.load_state_dict(ours.module.state_dict())
    for _ in range(3):
        one_step(ours, torch.float32)
        one_step(theirs, torch.float32)
    for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        # fp32, three steps of a few roundings each
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_computes_low_and_keeps_weights(stage, dtype):
    engine = start(stage, torch_autocast={"enabled": True, "dtype": dtype})
    seen = []
    engine.module[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    x, y = batch(0, 0, 0, torch.float32)
    losses = []
    for _ in range(4):
        loss = loss_of(engine, x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert set(seen) == {getattr(torch, dtype)}
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    assert losses[-1] < losses[0]


def test_buffers_keep_their_dtype_unless_the_configuration_names_one():
    net = torch.nn.Sequential(torch.nn.Linear(13, 5), torch.nn.BatchNorm1d(5))
    engine = start(1, net, bf16={"enabled": True})
    assert net[1].running_mean.dtype == torch.float32 and net[1].weight.dtype == torch.bfloat16
    net = torch.nn.Sequential(torch.nn.Linear(13, 5), torch.nn.BatchNorm1d(5))
    engine = start(1, net, bf16={"enabled": True}, data_types={"buffer_dtype": "bf16"})
    assert engine.module[1].running_mean.dtype == torch.bfloat16
    assert engine.module[1].num_batches_tracked.dtype == torch.int64


def test_auto_cast_halves_floating_inputs():
    engine = start(1, fp16={**FP16, "auto_cast": True})
    x, _ = batch(0, 0, 0, torch.float32)
    assert engine(x).dtype == torch.float16
