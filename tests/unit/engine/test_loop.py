# SPDX-License-Identifier: Apache-2.0
"""The engine's loop in one process: accumulation, boundaries, plain backward, schedulers, counters."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import deepspeed
from tests.helpers.parity import SLABS_ROUND_ALIKE, batch, loss_of, model

STAGES = [0, 1, 2]


def config(stage=0, **extra):
    return {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **extra,
    }


def start(stage=0, net=None, **extra):
    net = model() if net is None else net
    engine, *_ = deepspeed.initialize(model=net, config=config(stage, **extra))
    return engine


def data(micro=0, dtype=torch.float32):
    return batch(0, micro, 0, dtype)


def weights(engine):
    return [p.detach().clone() for p in engine.module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_initialize_returns_engine_optimizer_loader_scheduler():
    got = deepspeed.initialize(model=model(), config=config(2))
    assert type(got[0]) is deepspeed.DeepSpeedEngine
    assert got[1] is got[0].optimizer
    assert got[2] is None and got[3] is None
    assert deepspeed.dist is deepspeed.comm


@pytest.mark.parametrize("stage", STAGES)
def test_weights_move_only_at_the_boundary(stage):
    engine = start(stage, gradient_accumulation_steps=3)
    before = weights(engine)
    for micro in range(3):
        assert engine.is_gradient_accumulation_boundary() == (micro == 2)
        engine.backward(loss_of(engine, *data(micro)))
        engine.step()
        assert engine.was_step_applied() == (micro == 2)
        assert same(before, weights(engine)) == (micro < 2)
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (3, 1, 9)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_plain_backward_does_what_engine_backward_does(stage, accumulate):
    runs = []
    for plain in (False, True):
        engine = start(stage, gradient_accumulation_steps=accumulate)
        for micro in range(2 * accumulate):
            loss = loss_of(engine, *data(micro))
            if plain:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
        runs.append(weights(engine))
    for a, b in zip(*runs, strict=True):
        # A third of each gradient against the gradient of a third of the loss: one rounding apart.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_plain_backward_of_an_output_that_contains_another_divides_once(stage):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, x, y):
            out = self.net(x)
            return {"logits": out, "loss": (out - y).square().mean()}

    runs = []
    for plain in (False, True):
        engine = start(stage, net=Both(), gradient_accumulation_steps=2)
        for micro in range(2):
            loss = engine(*data(micro))["loss"]
            loss.backward() if plain else engine.backward(loss)
            engine.step()
        runs.append(weights(engine))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_plain_backward_that_raises_the_next_one_works(stage):
    engine = start(stage)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyError("broken backward")

    net = engine.module
    out = Broken.apply(net[2](net[1](net[0](data()[0]))))
    with pytest.raises(KeyError, match="broken"):
        (engine.module(data()[0]).sum() + out.sum()).backward()
    engine.zero_grad()
    before = weights(engine)
    loss_of(engine, *data()).backward()
    engine.step()
    assert not same(before, weights(engine))


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_is_legal_and_adds_up(stage):
    plain, quiet = (
        start(stage, gradient_accumulation_steps=2),
        start(stage, gradient_accumulation_steps=2),
    )
    for engine in (plain, quiet):
        for micro in range(2):
            loss = loss_of(engine, *data(micro))
            if engine is quiet and micro == 0:
                with engine.no_sync():
                    engine.backward(loss)
                    assert engine.inside_no_sync_ctxt
            else:
                engine.backward(loss)
            engine.step()
    assert same(weights(plain), weights(quiet))


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_between_boundaries_may_be_inside_no_sync(stage):
    outside, inside = (start(stage, gradient_accumulation_steps=2) for _ in range(2))
    for micro in range(4):
        outside.backward(loss_of(outside, *data(micro)))
        outside.step()
        with contextlib.nullcontext() if micro % 2 else inside.no_sync():
            inside.backward(loss_of(inside, *data(micro)))
            inside.step()
    assert inside.global_steps == 2
    assert same(weights(inside), weights(outside))


def test_step_inside_no_sync_and_reentry_are_refused():
    engine = start()
    with engine.no_sync():
        with pytest.raises(AssertionError, match="no_sync"):
            engine.step()
        with pytest.raises(AssertionError, match="reentry"), engine.no_sync():
            pass


@pytest.mark.parametrize("stage", STAGES)
def test_unmanaged_accumulation_steps_where_the_caller_says(stage):
    engine = start(stage, managed_gradient_accumulation=False)
    by_hand = model()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for micro in range(3):
        engine.backward(loss_of(engine, *data(micro)))
        loss_of(by_hand, *data(micro)).backward()
    engine.step()
    optimizer.step()
    assert engine.was_step_applied() and engine.global_steps == 1 and engine.global_samples == 9
    for a, b in zip(weights(engine), by_hand.parameters(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-6, atol=2.4e-7
        )  # two ulps at 1: fused multiply-adds
    with pytest.raises(AssertionError, match="managed"):
        engine.set_gradient_accumulation_boundary(True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_forced_boundary_sticks(stage):
    engine = start(stage, gradient_accumulation_steps=4)
    for boundary in (False, True, True):
        engine.set_gradient_accumulation_boundary(is_boundary=boundary)
        engine.backward(loss_of(engine, *data()), scale_wrt_gas=False)
        engine.step()
        assert engine.was_step_applied() == boundary


def test_backward_returns_the_loss_as_it_counts():
    engine = start(1, gradient_accumulation_steps=2)
    loss = loss_of(engine, *data())
    assert engine.backward(loss).item() == pytest.approx(loss.item() / 2)
    loss = loss_of(engine, *data())
    assert engine.backward(loss, scale_wrt_gas=False).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_after_eval_and_no_grad(stage):
    engine = start(stage)
    losses = []
    for _ in range(6):
        engine.train()
        engine.backward(loss_of(engine, *data()))
        engine.step()
        engine.eval()
        assert not engine.module.training and not engine.training
        with torch.no_grad():
            losses.append(loss_of(engine, *data()).item())
    assert losses == sorted(losses, reverse=True)


def test_an_engine_without_optimizer_computes_and_says_what_it_lacks():
    cfg = config()
    del cfg["optimizer"]
    engine, optimizer, _, _ = deepspeed.initialize(model=model(), config=cfg)
    assert optimizer is None and engine(data()[0]).shape == (3, 5)
    with pytest.raises(AssertionError, match="optimizer"):
        engine.backward(loss_of(engine, *data()))
    with pytest.raises(RuntimeError, match="no optimizer"):
        engine.step()


@pytest.mark.parametrize("stage", STAGES)
def test_groups_keep_their_own_rate_and_decay(stage):
    net, by_hand = model(), model()

    def groups(m):
        decayed = [p for p in m.parameters() if p.ndim > 1]
        rest = [p for p in m.parameters() if p.ndim <= 1]
        return [
            {"params": decayed, "lr": 1e-2, "weight_decay": 0.3},
            {"params": rest, "lr": 3e-3, "weight_decay": 0.0},
        ]

    cfg = config(stage)
    del cfg["optimizer"]
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.AdamW(groups(net), foreach=False), config=cfg
    )
    optimizer = torch.optim.AdamW(groups(by_hand), foreach=False)
    for micro in range(3):
        engine.backward(loss_of(engine, *data(micro)))
        engine.step()
        optimizer.zero_grad()
        loss_of(by_hand, *data(micro)).backward()
        optimizer.step()
    if SLABS_ROUND_ALIKE:
        assert same(weights(engine), list(by_hand.parameters()))
    else:  # an ulp of fp32 at 1 a step; all weights are below 1
        torch.testing.assert_close(weights(engine), list(by_hand.parameters()), rtol=0, atol=4e-7)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", ["instance", "callable", "config"])
def test_schedulers_drive_the_rate_once_a_step(stage, form):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
    make = lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5)  # noqa: E731
    cfg = config(stage, gradient_accumulation_steps=2)
    del cfg["optimizer"]
    scheduler = {"instance": make(optimizer), "callable": make, "config": None}[form]
    if form == "config":
        cfg["scheduler"] = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    engine, _, _, got = deepspeed.initialize(
        model=net, optimizer=optimizer, lr_scheduler=scheduler, config=cfg
    )
    assert isinstance(got, torch.optim.lr_scheduler.StepLR)
    for micro in range(4):
        engine.backward(loss_of(engine, *data(micro)))
        engine.step()
    assert engine.get_lr() == [0.25]


def test_our_scheduler_of_the_configuration_drives_the_rate():
    scheduler = {
        "type": "WarmupLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 0.1,
            "warmup_num_steps": 4,
            "warmup_type": "linear",
        },
    }
    engine = start(2, scheduler=scheduler)
    seen = []
    for micro in range(6):
        engine.backward(loss_of(engine, *data(micro)))
        engine.step()
        seen.append(engine.get_lr()[0])
    assert seen == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.1])


@pytest.mark.parametrize("stage", [0, 2])
def test_the_norm_is_none_before_the_first_step_and_that_of_the_gradients_after(stage):
    engine, by_hand = start(stage, gradient_clipping=0.01), model()
    assert engine.get_global_grad_norm() is None
    engine.backward(loss_of(engine, *data()))
    engine.step()
    loss_of(by_hand, *data()).backward()
    want = torch.cat([p.grad.double().flatten() for p in by_hand.parameters()]).norm()
    assert float(engine.get_global_grad_norm()) == pytest.approx(want.item(), rel=1e-6)
    assert engine.get_global_grad_norm().ndim == 0


def test_names_fall_through_to_the_module():
    net = model()
    net.colour = "blue"
    engine = start(net=net)
    assert engine.colour == "blue" and engine.module is net
    assert next(iter(engine.state_dict())).startswith("module.")
    with pytest.raises(AttributeError, match="'DeepSpeedEngine' object has no attribute 'nothing'"):
        _ = engine.nothing


def test_batch_size_changes_by_accumulation():
    engine = start(1)
    engine.set_train_batch_size(12)
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (12, 4)
    with pytest.raises(ValueError, match="divisible"):
        engine.set_train_batch_size(10)
    engine.set_train_micro_batch_size(5)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (20, 5)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_grad_forgets_what_backward_left(stage):
    engine, other = start(stage), start(stage)
    engine.backward(loss_of(engine, *data(7)))
    engine.zero_grad()
    for each in (engine, other):
        each.backward(loss_of(each, *data(1)))
        each.step()
    assert same(weights(engine), weights(other))


@pytest.mark.parametrize("stage", STAGES)
def test_training_data_comes_back_as_a_loader(stage):
    dataset = torch.utils.data.TensorDataset(torch.randn(12, 13), torch.randn(12, 5))
    engine, _, loader, _ = deepspeed.initialize(
        model=model(), training_data=dataset, config=config(stage)
    )
    assert len(loader) == 4
    for x, y in loader:
        assert x.shape == (3, 13)
        engine.backward(loss_of(engine, x, y))
        engine.step()
    assert engine.global_samples == 12


@pytest.mark.parametrize("stage", STAGES)
def test_compile_changes_no_result(stage):
    engine, other = start(stage), start(stage)
    engine.compile(backend="eager")
    engine.compile(backend="eager")
    assert engine.is_compiled and not other.is_compiled
    for each in (engine, other):
        each.backward(loss_of(each, *data()))
        each.step()
    for a, b in zip(weights(engine), weights(other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_destroy_leaves_a_plain_module(stage):
    net = model()
    engine = start(stage, net=net)
    engine.destroy()
    loss_of(net, *data()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert not net._forward_hooks and not net._forward_pre_hooks


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_of_the_module_lives_by_itself(stage):
    engine = start(stage)
    twin = copy.deepcopy(engine.module)
    for hook in (*twin._forward_hooks.values(), *twin._forward_pre_hooks.values()):
        assert not hasattr(hook, "__self__"), "the engine was copied with the module"
    before = [p.detach().clone() for p in twin.parameters()]
    engine.backward(loss_of(engine, *data()))
    engine.step()
    assert same(before, list(twin.parameters()))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_go_and_come_back(stage):
    engine, other = start(stage), start(stage)
    for each in (engine, other):
        each.backward(loss_of(each, *data(0)))
        each.step()
    engine.offload_states()
    engine.reload_states()
    for each in (engine, other):
        each.backward(loss_of(each, *data(1)))
        each.step()
    assert same(weights(engine), weights(other))


def test_only_sharded_states_can_go():
    with pytest.raises(AssertionError, match="stage 1, 2 or 3"):
        start(0).offload_states()


@pytest.mark.parametrize("stage", [0, 1])
def test_unmanaged_accumulation_does_not_overlap_below_stage_2(stage):
    zero = {"stage": stage, "overlap_comm": True}
    with pytest.raises(AssertionError, match="overlap_comm only with ZeRO stage 2"):
        start(stage, managed_gradient_accumulation=False, zero_optimization=zero)


def test_odd_gathers_are_refused():
    with pytest.raises(AssertionError, match="nccl_start_alignment_factor"):
        start(1, zero_optimization={"stage": 1, "allgather_bucket_size": 1001})


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_scale_takes_a_scalar(stage):
    engine = start(stage)
    with pytest.raises(AssertionError, match="scalar tensor"):
        engine.scale(engine(data()[0]))


@pytest.mark.parametrize("stage", [1, 3])
def test_one_reduction_for_all_is_refused_where_something_else_decides(stage, monkeypatch):
    engine = start(stage)
    with (
        engine.no_sync(),
        pytest.raises(AssertionError, match="nested"),
        engine.coalesce_grad_reduction(),
    ):
        pass
    engine.set_gradient_accumulation_boundary(False)
    with engine.coalesce_grad_reduction():
        engine.backward(loss_of(engine, *data()))
    assert engine._is_gradient_accumulation_boundary is False
    monkeypatch.setattr(engine, "pipeline_parallelism", True)
    with (
        pytest.raises(NotImplementedError, match="pipeline parallelism"),
        engine.coalesce_grad_reduction(),
    ):
        pass


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_group_without_params_keeps_its_place(stage, tmp_path):
    # The Trainer's second group is such when only adapters are trained; schedulers count groups.
    def begin():
        net = torch.nn.Linear(3, 2)
        groups = [{"params": [], "lr": 0.5}, {"params": list(net.parameters())}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        settings = {**config(stage), "zero_allow_untested_optimizer": True}
        run = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]
        return run, scheduler

    def step(run, scheduler):
        run.backward(run(torch.ones(3, 3)).square().mean())
        run.step()
        scheduler.step()
        return [group["lr"] for group in run.optimizer.param_groups]

    first, second = begin(), begin()
    assert step(*first) == [0.25, 5e-3]
    first[0].save_checkpoint(tmp_path)
    second[0].load_checkpoint(tmp_path)
    second[1].load_state_dict(first[1].state_dict())
    assert step(*first) == step(*second)
    for engine in (first[0], second[0]):
        engine.eval()
    assert torch.equal(first[0](torch.eye(3)), second[0](torch.eye(3)))
