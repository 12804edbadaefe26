# SPDX-License-Identifier: Apache-2.0
"""The engine on several gloo ranks: what only more than one process can show."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

STAGES = [0, 1, 2]


def start(net, stage, **extra):
    cfg = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50, "overlap_comm": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}},
        **extra,
    }
    return deepspeed.initialize(model=net, config=cfg)[0]


class Branches(torch.nn.Module):
    """Each rank takes its own branch, so each lacks the other's gradients, and sees them in its own order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(6, 6)
        self.left, self.right = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x, branch):
        return [self.left, self.right][branch](self.trunk(x))


def different_branches(rank, stage, accumulate):
    engine = start(Branches(), stage, gradient_accumulation_steps=accumulate)
    for k in range(3 * accumulate):
        x = torch.full((2, 6), 0.1 * (k + rank + 1))
        engine.backward(engine(x, (rank + k) % 2).square().mean())
        engine.step()
    return [p.detach().clone() for p in engine.module.parameters()]


def branches_by_hand(ranks, accumulate):
    net = Branches()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for micro in range(accumulate):
            k = step * accumulate + micro
            for rank in range(ranks):
                x = torch.full((2, 6), 0.1 * (k + rank + 1))
                (net(x, (rank + k) % 2).square().mean() / accumulate / ranks).backward()
        optimizer.step()
    return list(net.parameters())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_that_take_different_branches_stay_in_step(stage, accumulate, ranks2):
    first, second = ranks2.run(different_branches, stage, accumulate)
    for a, b, want in zip(first, second, branches_by_hand(2, accumulate), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, want, rtol=1e-5, atol=1e-6)


class Reused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.shared, self.last = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, use):
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=True) if use else self.shared(x)
        return self.last(x)


def reused_in_reentrant_checkpoints(rank, stage, plain, section):
    runs = []
    for use in (False, True):
        engine = start(Reused(), stage, **({section: {"enabled": True}} if section else {}))
        dtype = engine.module.first.weight.dtype
        for k in range(3):
            x = torch.full((2, 4), k + rank + 1.0, dtype=dtype)
            loss = engine(x, use).float().square().mean()
            loss.backward() if plain else engine.backward(loss)
            engine.step()
        runs.append([p.detach().clone() for p in engine.module.parameters()])
    return runs


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("section", "atol"), [(None, 1e-6), ("bf16", 8e-3)])
def test_a_gradient_that_arrives_twice_is_reduced_whole(stage, plain, section, atol, ranks2):
    for without, within in ranks2.run(reused_in_reentrant_checkpoints, stage, plain, section):
        for a, b in zip(without, within, strict=True):
            # The instalments are added in another order: one rounding of the dtype apart.
            torch.testing.assert_close(a, b, rtol=0.0, atol=atol)


def unequal_start(rank, stage):
    torch.manual_seed(rank)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    net.scalar = torch.nn.Parameter(torch.tensor(float(rank), dtype=torch.bfloat16))
    engine = start(net, stage)
    return [t.detach().clone() for t in engine.module.parameters()]


@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_begin_with_the_first_ones_weights(stage, ranks2):
    first, second = ranks2.run(unequal_start, stage)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [t.item() for t in first if t.ndim == 0] == [0.0]


def no_sync_then_sync(rank, stage, grad_dtype):
    net = torch.nn.Linear(5, 3)
    torch.manual_seed(2)
    torch.nn.init.normal_(net.weight)
    extra = {"bf16": {"enabled": True}} if grad_dtype else {}
    if grad_dtype:
        extra["data_types"] = {"grad_accum_dtype": grad_dtype}
    engine = start(net, stage, gradient_accumulation_steps=3, **extra)
    dtype = net.weight.dtype
    for micro in range(6):
        x = torch.full((2, 5), 1.0 + micro + rank, dtype=dtype)
        loss = engine(x).float().square().mean()
        if micro % 3 < 2:
            with engine.no_sync():
                engine.backward(loss)
        else:
            engine.backward(loss)
        engine.step()
    return net.weight.detach().clone()


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_gives_the_result_of_syncing_each_time(stage, ranks2):
    quiet = ranks2.run(no_sync_then_sync, stage, None)
    assert torch.equal(quiet[0], quiet[1])


@pytest.mark.parametrize("stage", [1, 2])
def test_fp32_sums_of_bf16_gradients_on_two_ranks(stage, ranks2):
    first, second = ranks2.run(no_sync_then_sync, stage, "fp32")
    assert torch.equal(first, second)


def overflow_on_one_rank(rank, stage, section):
    net = torch.nn.Linear(4, 2)
    engine = start(net, stage, **{section: {"enabled": True}} if section else {})
    before = net.weight.detach().clone()
    x = torch.ones(2, 4, dtype=net.weight.dtype)
    loss = engine(x).float().mean() * (float("inf") if rank == 1 else 1.0)
    try:
        engine.backward(loss)
        engine.step()
        error = None
    except FloatingPointError as exception:
        error = str(exception)
    return torch.equal(before, net.weight), engine.skipped_steps, error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("section", ["fp16", "bf16"])
def test_one_ranks_overflow_skips_the_step_of_all(stage, section, ranks2):
    assert ranks2.run(overflow_on_one_rank, stage, section) == [(True, 1, None)] * 2


@pytest.mark.parametrize("stage", [1, 2])
def test_one_ranks_broken_fp32_gradient_raises_on_all(stage, ranks2):
    for same, skipped, error in ranks2.run(overflow_on_one_rank, stage, None):
        assert same and skipped == 0 and "not finite" in error


def held(rank, stage):
    net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    engine = start(net, stage, bf16={"enabled": True})
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 64, dtype=torch.bfloat16)).float().mean())
        engine.step()
    storages = {}
    for group in engine.optimizer.groups:
        for part in group.parts:
            for t in [part.master, part.held_grad, *engine.optimizer.state[part.master].values()]:
                if isinstance(t, torch.Tensor) and t.numel() > 1:
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    for p in net.parameters():
        storages[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    return sum(storages.values()), sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("stage", "per_param"),
    [
        (
            1,
            2 + 12 / 2,
        ),  # between steps, with gradients (2 bytes each, replicated) freed: arXiv:1910.02054, table 1
        (2, 2 + (2 + 12) / 2),
    ],
)
def test_memory_is_the_papers_formula_on_two_ranks(stage, per_param, ranks2):
    for held_bytes, numel in ranks2.run(held, stage):
        assert held_bytes == pytest.approx(per_param * numel, rel=0.02)


def unused_gradient_op(rank, op):
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    engine = start(
        net, 2, optimizer=sgd, zero_allow_untested_optimizer=True, gradient_allreduce_op=op
    )
    engine.backward(engine(torch.full((1, 2), rank + 1.0)).sum())
    engine.step()
    return net.weight.detach().clone()


@pytest.mark.parametrize(("op", "want"), [("mean", 1 - 1.5), ("sum", 1 - 3.0)])
def test_gradients_are_averaged_or_summed(op, want, ranks2):
    for weight in ranks2.run(unused_gradient_op, op):
        torch.testing.assert_close(weight, torch.full((1, 2), want))


def step_without_a_backward(rank, stage, folder):
    zero = {"stage": stage, "reduce_bucket_size": 7, "sub_group_size": 5}
    if folder:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": folder}
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    cfg = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    engine = deepspeed.initialize(model=net, optimizer=sgd, config=cfg)[0]
    found = []
    for backward in (True, False, True):
        if backward:
            engine.backward(engine(torch.ones(2, 4)).sum())
        before = [safe_get_full_fp32_param(p).clone() for p in net.parameters()]
        has = {safe_get_full_grad(p) is not None for p in net.parameters()}
        engine.optimizer.step()
        after = [safe_get_full_fp32_param(p) for p in net.parameters()]
        found.append((has, [(a - b).unique().tolist() for a, b in zip(after, before, strict=True)]))
    engine.destroy()
    return found, engine.optimizer._global_grad_norm.item()


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_is_stepped_once(stage, files, ranks2, tmp_path):
    for found, norm in ranks2.run(step_without_a_backward, stage, str(tmp_path) if files else None):
        assert [has for has, _ in found] == [{True}, {False}, {True}]
        for (_, moved), want in zip(found, (-1.0, 0.0, -1.0), strict=True):
            # gradients are 2 everywhere; weights below 1 in size round to 1e-7
            assert all(m == pytest.approx(want, abs=1e-6) for deltas in moved for m in deltas)
        assert norm == pytest.approx(2.0 * 15**0.5)


class SplitInTwo:
    """A caller's groups: both ranks share each layer, neither has a data-parallel neighbour."""

    def __init__(self):
        ranks = torch.distributed.get_world_size()
        self.alone = [torch.distributed.new_group([r]) for r in range(ranks)]
        self.rank = torch.distributed.get_rank()

    def get_data_parallel_group(self):
        return self.alone[self.rank]

    def get_data_parallel_world_size(self):
        return 1

    def get_data_parallel_rank(self):
        return 0

    def get_model_parallel_group(self):
        return torch.distributed.group.WORLD

    def get_model_parallel_world_size(self):
        return len(self.alone)

    def get_model_parallel_rank(self):
        return self.rank


SECTIONS = {
    None: {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}


def shares_of_a_layer(rank, stage, section, factor):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    net[0].weight.tensor_model_parallel = True
    net[0].weight.register_hook(lambda grad: grad * (factor if rank == 1 else 1.0))
    cfg = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.01,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **SECTIONS[section],
    }
    engine = deepspeed.initialize(model=net, config=cfg, mpu=SplitInTwo())[0]
    start = net[1].weight.detach().clone()
    squares = {}
    for name, param in net.named_parameters():
        param.register_hook(lambda g, n=name: squares.update({n: g.double().square().sum().item()}))
    engine.backward(engine(torch.ones(2, 4, dtype=start.dtype)).float().sum())
    try:
        engine.step()
        said = None
    except FloatingPointError as error:
        said = str(error)
    kept = all(p.grad is None for p in net.parameters()) and torch.equal(start, net[1].weight)
    share = squares.pop("0.weight")
    return engine.get_global_grad_norm(), share, sum(squares.values()), kept, said


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_tensor_parallel_ranks_clip_by_one_norm(stage, ranks2):
    results = ranks2.run(shares_of_a_layer, stage, None, 3.0)
    want = (results[0][1] + results[1][1] + results[0][2]) ** 0.5
    assert [float(norm) for norm, *_ in results] == [pytest.approx(want, rel=1e-6)] * 2


@pytest.mark.parametrize(
    ("stage", "section"),
    [(0, None), (1, None), (0, "fp16"), (2, "fp16"), (1, "bf16"), (0, "autocast")],
)
def test_one_tensor_parallel_ranks_overflow_is_that_of_both(stage, section, ranks2):
    for _, _, _, kept, said in ranks2.run(shares_of_a_layer, stage, section, float("inf")):
        assert kept and (section is not None or "not finite" in said)
