# SPDX-License-Identifier: Apache-2.0
"""The optimizers as torch optimizers: against torch.optim and float64 maths, state dicts, copies, wrong use."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.sgd import DeepSpeedCPUSGD
from tests.unit.ops.params import params_of, set_grads, twins

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ELEMENTWISE = [
    DeepSpeedCPUAdam,
    FusedAdam,
    DeepSpeedCPULion,
    FusedLion,
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUSGD,
]
EVERY = [*ELEMENTWISE, FusedLamb]


def assert_like_torch(ours, theirs, path):
    if path == "reference":
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    else:
        # a few roundings of fp32 a step; params and moves are of order one
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


ADAM = [
    (DeepSpeedCPUAdam, {"adamw_mode": True}, torch.optim.AdamW),
    (DeepSpeedCPUAdam, {"adamw_mode": False}, torch.optim.Adam),
    (FusedAdam, {"adam_w_mode": True}, torch.optim.AdamW),
    (FusedAdam, {"adam_w_mode": False}, torch.optim.Adam),
]


@pytest.mark.parametrize(("ours", "mode", "theirs"), ADAM)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_torch(path, ours, mode, theirs, decay):
    mine = params_of()
    reference = twins(mine)
    rule = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    a = ours(mine, **rule, **mode)
    b = theirs(reference, **rule, foreach=False, fused=False)
    for _ in range(5):
        set_grads(mine, reference)
        a.step()
        b.step()
    assert_like_torch(mine, reference, path)


def test_adam_without_bias_correction():
    (param,) = params_of([(64,)])
    start, grad = param.detach().double(), torch.randn(64)
    optimizer = DeepSpeedCPUAdam([param], lr=0.1, bias_correction=False, eps=1e-3)
    param.grad = grad.clone()
    optimizer.step()
    g = grad.double()
    expected = start - 0.1 * (0.1 * g) / ((0.001 * g * g).sqrt() + 1e-3)
    # ten roundings of fp32, of terms of order one
    torch.testing.assert_close(param.detach().double(), expected, rtol=0, atol=2e-6)


def test_adagrad_is_that_of_torch(path):
    mine = params_of()
    reference = twins(mine)
    a = DeepSpeedCPUAdagrad(mine, lr=0.1, weight_decay=0.1)
    b = torch.optim.Adagrad(reference, lr=0.1, weight_decay=0.1, foreach=False)
    for _ in range(5):
        set_grads(mine, reference)
        a.step()
        b.step()
    assert_like_torch(mine, reference, path)


# torch's own Adagrad makes its sparse tensors without saying whether they are to be checked
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("sparse_dims", [1, 2])
def test_adagrad_takes_sparse_gradients(path, sparse_dims):
    mine = params_of([(10, 4)])
    reference = twins(mine)
    a = DeepSpeedCPUAdagrad(mine, lr=0.1)
    b = torch.optim.Adagrad(reference, lr=0.1, foreach=False)
    for _ in range(3):
        # the index (1, ...) comes twice: its values are to be summed first
        index = torch.tensor([[1, 7, 1], [0, 2, 0]])[:sparse_dims]
        values = torch.randn(3, *(10, 4)[sparse_dims:])
        for param in (mine[0], reference[0]):
            param.grad = torch.sparse_coo_tensor(
                index, values.clone(), (10, 4), check_invariants=True
            )
        a.step()
        b.step()
    # torch divides and multiplies in another order: a few roundings of fp32
    torch.testing.assert_close(mine, reference, rtol=2e-6, atol=2e-6)
    untouched = [0, *range(2, 7), 8, 9]
    assert torch.equal(a.state[mine[0]]["exp_avg_sq"][untouched], torch.zeros(8, 4))


@pytest.mark.parametrize("ours", [DeepSpeedCPULion, FusedLion])
def test_lion_is_its_formula(path, ours):
    (param,) = params_of([(65,)])
    p, m = param.detach().double(), torch.zeros(65, dtype=F64)
    optimizer = ours([param], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(4):
        set_grads([param])
        g = param.grad.double()
        p = p * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.98 * m + 0.02 * g
        optimizer.step()
    # random gradients are nowhere near a zero of the direction: only roundings differ
    torch.testing.assert_close(param.detach().double(), p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ours", [DeepSpeedCPULion, FusedLion])
def test_lion_leaves_an_element_without_any_gradient_alone(path, ours):
    (param,) = params_of([(20,)])
    start = param.detach().clone()
    param.grad = torch.zeros(20)
    ours([param], lr=0.01).step()
    assert torch.equal(param, start)


@pytest.mark.parametrize("inside", [True, False])
def test_lamb_is_its_formula(inside):
    (param,) = params_of([(33,)])
    p = param.detach().double()
    m, v = torch.zeros(33, dtype=F64), torch.zeros(33, dtype=F64)
    optimizer = FusedLamb([param], lr=0.02, weight_decay=0.1, eps=1e-3, eps_inside_sqrt=inside)
    for step in (1, 2, 3):
        set_grads([param])
        g = param.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = m / ((v + 1e-3).sqrt() if inside else v.sqrt() + 1e-3) + 0.1 * p
        ratio = (p.norm() / update.norm()).clamp(0.01, 10)
        p = p - 0.02 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) * ratio * update
        optimizer.step()
        assert optimizer.get_lamb_coeffs() == pytest.approx([ratio.item()], rel=1e-5)
    torch.testing.assert_close(param.detach().double(), p, rtol=0, atol=1e-5)


def test_lamb_clips_the_norm_of_a_group():
    params = params_of([(9,), (4,)])
    half = twins(params)
    set_grads(params)
    norm = torch.cat([p.grad for p in params]).norm()
    for a, b in zip(params, half, strict=True):
        b.grad = a.grad / 2
    FusedLamb(params, max_grad_norm=float(norm) / 2).step()
    FusedLamb(half).step()
    # a few roundings of fp32
    torch.testing.assert_close(params, half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_16_bit_params_make_one_rounding_a_step(path, optimizer, dtype):
    (param,) = params_of([(501,)], dtype)
    wide = torch.nn.Parameter(param.detach().float())
    ours, exact = optimizer([param], lr=1e-2), optimizer([wide], lr=1e-2)
    set_grads([param])
    wide.grad = param.grad.float()
    ours.step()
    exact.step()
    assert torch.equal(param, wide.to(dtype))


def test_the_dtype_of_the_moments_is_chosen():
    for wide, expected in ((True, F32), (False, BF16)):
        (param,) = params_of([(3,)], BF16)
        optimizer = DeepSpeedCPUAdam([param], fp32_optimizer_states=wide)
        set_grads([param])
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].dtype == expected
    (param,) = params_of([(3,)], BF16)
    optimizer = FusedAdam([param])
    set_grads([param])
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].dtype == BF16


def test_state_has_the_public_keys():
    keys = {
        DeepSpeedCPUAdam: {"step", "exp_avg", "exp_avg_sq"},
        FusedAdam: {"step", "exp_avg", "exp_avg_sq"},
        FusedLamb: {"step", "exp_avg", "exp_avg_sq"},
        DeepSpeedCPULion: {"step", "exp_avg"},
        FusedLion: {"step", "exp_avg"},
        DeepSpeedCPUAdagrad: {"step", "exp_avg_sq"},
        DeepSpeedCPUSGD: {"step"},  # without momentum
    }
    for optimizer in EVERY:
        (param,) = params_of([(3,)])
        made = optimizer([param])
        set_grads([param])
        made.step()
        assert set(made.state[param]) == keys[optimizer]
        assert made.state[param]["step"] == 1


@pytest.mark.parametrize("optimizer", EVERY)
def test_training_goes_on_from_a_state_dict(path, optimizer):
    dtype = F32 if optimizer is FusedLamb else BF16
    params = params_of(dtype=dtype)
    first = optimizer(params, lr=1e-2)
    set_grads(params)
    first.step()
    others = twins(params)
    second = optimizer(others, lr=5.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        set_grads(params, others)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_loading_keeps_fp32_moments_of_16_bit_params():
    (param,) = params_of([(100,)], BF16)
    optimizer = DeepSpeedCPUAdam([param])
    set_grads([param])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = DeepSpeedCPUAdam(twins([param]))
    fresh.load_state_dict(saved)
    moment = fresh.state[fresh.param_groups[0]["params"][0]]["exp_avg"]
    assert moment.dtype == F32
    assert torch.equal(moment, optimizer.state[param]["exp_avg"])


def test_pre_hooks_of_loading_are_respected():
    (param,) = params_of([(4,)])
    optimizer = DeepSpeedCPUAdam([param])
    set_grads([param])
    optimizer.step()

    def double(_, state_dict):
        state_dict["state"][0]["exp_avg"] = state_dict["state"][0]["exp_avg"] * 2
        return state_dict

    expected = optimizer.state[param]["exp_avg"] * 2
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(optimizer.state[param]["exp_avg"], expected)


def test_states_of_torch_adam_are_understood():
    mine = params_of([(6,)])
    reference = twins(mine)
    theirs = torch.optim.AdamW(reference, lr=0.1, foreach=False)
    set_grads(mine, reference)
    theirs.step()
    with torch.no_grad():
        mine[0].copy_(reference[0])
    ours = DeepSpeedCPUAdam(mine, lr=0.1)
    state = copy.deepcopy(theirs.state_dict()["state"])
    ours.load_state_dict({"state": state, "param_groups": ours.state_dict()["param_groups"]})
    assert ours.state[mine[0]]["step"] == 1
    theirs.param_groups[0]["weight_decay"] = 0
    set_grads(mine, reference)
    ours.step()
    theirs.step()
    torch.testing.assert_close(mine, reference, rtol=2e-6, atol=2e-6)


def test_steps_counted_on_the_last_param_of_a_group_are_understood():
    params = params_of([(2,), (3,)])
    optimizer = FusedAdam(params)
    set_grads(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"], saved["state"][1]["step"] = 0, 7
    optimizer.load_state_dict(saved)
    assert [optimizer.state[p]["step"] for p in params] == [7, 7]


@pytest.mark.parametrize("optimizer", EVERY)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_step_like_the_original(optimizer, duplicate):
    params = params_of([(12,)])
    first = optimizer(params, lr=1e-2, weight_decay=0.1)
    set_grads(params)
    first.step()
    second = duplicate(first)
    others = second.param_groups[0]["params"]
    set_grads(params, others)
    first.step()
    second.step()
    assert torch.equal(params[0], others[0])


@pytest.mark.parametrize("optimizer", EVERY)
def test_schedulers_closures_and_further_groups_work(optimizer):
    (param,), (later,) = params_of([(4,)]), params_of([(5,)])
    made = optimizer([{"params": [param], "lr": 0.5}], lr=1e-3)
    made.add_param_group({"params": [later]})
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5**step)
    assert [group["initial_lr"] for group in made.param_groups] == [0.5, 1e-3]
    start = later.detach().clone()

    def closure():
        made.zero_grad()
        loss = (param**2).sum() + (later**2).sum()
        loss.backward()
        return loss

    assert made.step(closure).item() > 0
    schedule.step()
    assert [group["lr"] for group in made.param_groups] == [0.25, 5e-4]
    assert not torch.equal(later, start)


@pytest.mark.parametrize("optimizer", EVERY)
def test_params_without_gradients_are_left_alone(optimizer):
    params = params_of([(4,), (0,), (5,)])
    start = [p.detach().clone() for p in params]
    made = optimizer(params)
    params[1].grad, params[2].grad = torch.zeros(0), torch.ones(5)
    made.step()
    assert torch.equal(params[0], start[0])
    assert params[0] not in made.state
    assert not torch.equal(params[2], start[2])


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
@pytest.mark.parametrize("low", [None, BF16, F16])
def test_step_shard_scales_the_gradient_and_fills_the_copy(path, optimizer, low):
    shard, plain = params_of([(1000,)])[0], None
    plain = torch.nn.Parameter(shard.detach().clone())
    grad = torch.randn(1000).to(BF16)
    a, b = optimizer([shard], lr=1e-2), optimizer([plain], lr=1e-2)
    copy_out = None if low is None else torch.empty(1000, dtype=low)
    a.step_shard(a.param_groups[0], shard, grad, copy_out, grad_scale=0.25)
    plain.grad = grad.float() * 0.25
    b.step()
    assert torch.equal(shard, plain)
    if copy_out is not None:
        assert torch.equal(copy_out, shard.detach().to(low))


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_step_in_pieces_is_the_step(path, optimizer, dtype):
    whole = params_of([(1000,)])[0]
    shard = torch.nn.Parameter(whole.detach().clone())
    a, b = optimizer([shard], lr=1e-2), optimizer([whole], lr=1e-2)
    for _ in range(3):
        grad, found, want = torch.randn(1000).to(BF16), *torch.full((2, 1000), 7.0).to(dtype)
        # of whole vectors: torch rounds what is left over at an end otherwise, on some systems
        pieces = ((at, found[at : at + 256]) for at in range(0, 1000, 256))
        a.step_pieces(a.param_groups[0], shard, grad, pieces, 0.25)
        b.step_shard(b.param_groups[0], whole, grad, want, 0.25)
        assert torch.equal(shard, whole) and torch.equal(found, want)
    for name, value in b.state[whole].items():
        torch.testing.assert_close(a.state[shard][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_a_step_of_no_pieces_counts(optimizer):
    (shard,) = params_of([(0,)])
    made = optimizer([shard], lr=1e-2)
    for _ in range(2):
        made.step_pieces(made.param_groups[0], shard, torch.empty(0), [])
    assert made.state[shard]["step"] == 2


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
def test_autograd_can_notice_the_change_of_a_saved_param(path, optimizer):
    (param,) = params_of([(3,)])
    before = param._version
    param.grad = torch.ones(3)
    optimizer([param]).step()
    assert param._version > before


@pytest.mark.parametrize(
    "optimizer", [DeepSpeedCPUAdam, DeepSpeedCPULion, DeepSpeedCPUAdagrad, DeepSpeedCPUSGD]
)
def test_cpu_optimizers_refuse_params_elsewhere(optimizer):
    param = torch.nn.Parameter(torch.ones(2, device="meta"))
    param.grad = torch.ones(2, device="meta")
    with pytest.raises(AssertionError, match="CPU's memory"):
        optimizer([param]).step()


def test_fused_optimizers_refuse_what_they_cannot_do():
    (param,) = params_of([(4,)])
    for optimizer in (FusedAdam, FusedLamb):
        with pytest.raises(RuntimeError, match="AMSGrad"):
            optimizer([param], amsgrad=True)
    with pytest.raises(RuntimeError, match="grad_norms"):
        FusedAdam([param]).step(grad_norms=[1.0])
    with pytest.raises(RuntimeError, match="output_params"):
        FusedLion([param]).step(output_params=[param])
    param.grad = torch.ones(4).to_sparse()
    for optimizer in (FusedAdam, FusedLion, FusedLamb):
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer([param]).step()
    (double,) = params_of([(4,)], F64)
    set_grads([double])
    with pytest.raises(RuntimeError, match="float64"):
        FusedAdam([double]).step()


def test_gradients_are_dropped_or_zeroed_as_asked():
    for optimizer in (FusedAdam, FusedLion):
        (param,) = params_of([(2,)])
        set_grads([param])
        optimizer([param], set_grad_none=False).zero_grad()
        assert torch.equal(param.grad, torch.zeros(2))
        optimizer([param]).zero_grad()
        assert param.grad is None


def test_each_cpu_adam_has_its_own_id():
    (param,) = params_of([(2,)])
    first = DeepSpeedCPUAdam([param])
    second = copy.deepcopy(first)
    third = DeepSpeedCPUAdam([param])
    assert len({first.opt_id, second.opt_id, third.opt_id}) == 3
    assert DeepSpeedCPUAdam.optimizer_id > third.opt_id


@pytest.mark.parametrize("adamw", [True, False])
def test_subgroups_take_turns_in_the_groups_and_are_rolled_back(adamw):
    params = params_of([(50,), (60,)])
    whole = [torch.nn.Parameter(p.detach().clone()) for p in params]
    settings = {"lr": 0.01, "weight_decay": 0.1, "adamw_mode": adamw}
    optimizer, plain = DeepSpeedCPUAdam(params[:1], **settings), DeepSpeedCPUAdam(whole, **settings)

    def step(call):
        for number, param in enumerate(params):
            optimizer.param_groups[0]["params"] = [param]
            call(number)

    for _ in range(2):
        set_grads(params)
        for mine, theirs in zip(whole, params, strict=True):
            mine.grad = theirs.grad.clone()
        step(optimizer.step_subgroup)
        plain.step()
    after_two = [p.detach().clone() for p in params]
    assert all(torch.equal(p, q) for p, q in zip(params, whole, strict=True))
    moments = [optimizer.state[number]["exp_avg"].clone() for number in (0, 1)]
    set_grads(params)
    step(optimizer.step_subgroup)
    assert [optimizer.state[number]["step"] for number in (0, 1)] == [3, 3]
    step(optimizer.rollback_subgroup)
    for number, param in enumerate(params):
        # the roundings of one fp32 step, divided by beta1 and beta2
        torch.testing.assert_close(param.detach(), after_two[number], rtol=0, atol=1e-6)
        state = optimizer.state[number]
        torch.testing.assert_close(state["exp_avg"], moments[number], rtol=0, atol=1e-6)
        assert state["step"] == 2


def test_a_subgroup_that_cannot_be_stepped_or_taken_back_is_refused():
    params = params_of([(50,), (60,)])
    optimizer = DeepSpeedCPUAdam(params)
    with pytest.raises(RuntimeError, match="Cannot rollback optimizer state for sub_group_id 0"):
        optimizer.rollback_subgroup(0)
    set_grads(params)
    with pytest.raises(ValueError, match="2 params with gradients"):
        optimizer.step_subgroup(0)
    optimizer.param_groups[0]["params"] = params[:1]
    optimizer.step_subgroup(0)
    optimizer.rollback_subgroup(0)
    with pytest.raises(RuntimeError, match="Cannot rollback sub_group_id 0: step count is 0"):
        optimizer.rollback_subgroup(0)
    optimizer.param_groups[0]["params"] = params[1:]
    with pytest.raises(ValueError, match="of another size: got 50 elements, expected 60"):
        optimizer.step_subgroup(0)
