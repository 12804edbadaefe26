# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters on several gloo ranks: when they are whole, what may be edited, what is looked ahead for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.comm import flat
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def start(net, residency=None, optimizer=True, **extra):
    cfg = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, **(NOTHING_STAYS if residency is None else residency)},
        **extra,
    }
    if optimizer:
        cfg["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}}
    return deepspeed.initialize(model=net, config=cfg)[0]


def net_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 11), torch.nn.ReLU(), torch.nn.Linear(11, 5), torch.nn.LayerNorm(5)
    )


def x_of(rank, step):
    return torch.full((2, 7), 0.1 * (1 + rank + step))


def whole(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [p.detach().clone() for p in engine.module.parameters()]


def by_hand(net, ranks, steps, loss):
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(ranks):
            (loss(net, rank, step) / ranks).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def agree(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def attributes(rank):
    engine = start(net_of())
    p = engine.module[0].weight
    assert p.ds_process_group is not None and p.ds_zero_param_process_group is None  # no hpZ
    before = (p.numel(), tuple(p.shape), p.ds_status is ZeroParamStatus.NOT_AVAILABLE)
    with deepspeed.zero.GatheredParameters(p):
        inside = (tuple(p.shape), p.ds_status is ZeroParamStatus.AVAILABLE)
    slices = (
        p.ds_tensor.numel(),
        p.ds_numel,
        tuple(p.ds_shape),
        p.partition_numel(),
        p.ds_numel_aligned,
    )
    return before, inside, slices, p.numel(), type(engine.optimizer).__name__


def test_a_parameter_is_a_slice_between_uses(ranks2):
    for before, inside, slices, after, kind in ranks2.run(attributes):
        assert before == (0, (0,), True)
        assert inside == ((11, 7), True)
        assert slices == (39, 77, (11, 7), 39, 78)
        assert after == 0 and kind == "DeepSpeedZeroOptimizer_Stage3"


def plain_loss(net, rank, step):
    return net(x_of(rank, step)).square().sum()


def train(rank, residency, plain):
    engine = start(net_of(), residency)
    for step in range(5):
        loss = plain_loss(engine, rank, step)
        loss.backward() if plain else engine.backward(loss)
        engine.step()
        if step == 2:  # another order in between: evaluation, and a module called alone
            engine.eval()
            with torch.no_grad():
                engine(x_of(rank, 0))
                engine.module[2](torch.ones(2, 11))
            engine.train()
    return whole(engine), [p.numel() for p in engine.module.parameters()]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "residency",
    [
        None,
        {},
        {"stage3_param_persistence_threshold": 0},
        {"stage3_param_persistence_threshold": 20},
    ],
    ids=["nothing-stays", "defaults", "looks-ahead", "small-ones-stay"],
)
def test_training_is_that_of_the_plain_loop(residency, plain, ranks2):
    want = by_hand(net_of(), 2, 5, plain_loss)
    for got, left in ranks2.run(train, residency, plain):
        agree(got, want)
        if residency is None:
            assert left == [0] * len(left)


class Tied(torch.nn.Module):
    """A head that reads the embedding's weight, a parameter of another module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.embed = torch.nn.Embedding(6, 5)
        self.body = torch.nn.Linear(5, 5)
        self.body.requires_grad_(False)

    def forward(self, ids):
        return torch.nn.functional.linear(torch.tanh(self.body(self.embed(ids))), self.embed.weight)


def ids_of(rank, step):
    return torch.tensor([[rank, (step + 1) % 6], [5, 2]])


def tied_loss(net, rank, step):
    return net(ids_of(rank, step)).square().mean()


def train_tied(rank):
    engine = start(Tied())
    for step in range(4):
        engine.backward(tied_loss(engine, rank, step))
        engine.step()
    return whole(engine)


def test_weights_of_other_modules_are_found_by_themselves(ranks2):
    want = by_hand(Tied(), 2, 4, tied_loss)
    for got in ranks2.run(train_tied):
        agree(got, want)


class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(3))
        self.kind = None

    def forward(self, x):
        for layer in self.layers:
            if self.kind is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda v, f=layer: torch.tanh(f(v)), x, use_reentrant=self.kind)
        return x


def train_checkpointed(rank, kind):
    net = Deep()
    net.kind = kind
    engine = start(net)
    for step in range(4):
        x = x_of(rank, step).requires_grad_()
        engine.backward(engine(x).square().sum())
        engine.step()
    return whole(engine)


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not-reentrant"])
def test_activation_checkpointing_of_either_kind(kind, ranks2):
    want = by_hand(Deep(), 2, 4, plain_loss)
    for got in ranks2.run(train_checkpointed, kind):
        agree(got, want)


class EndsInALayer(torch.nn.Module):
    """Checkpointed blocks whose recomputation stops in the middle of their last layer: its output is not needed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        blocks = [(torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 7, bias=False))] * 2
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(*copy.deepcopy(b)) for b in blocks)
        self.kind = None

    def forward(self, x):
        for block in self.blocks:
            x = x + (block(x) if self.kind is None else checkpoint(block, x, use_reentrant=False))
        return x


def train_stopped_early(rank, residency):
    net = EndsInALayer()
    net.kind = False
    engine = start(net, residency)
    for step in range(4):
        engine.backward(engine(x_of(rank, step)).square().sum())
        engine.step()
    return whole(engine)


@pytest.mark.parametrize("residency", [None, {"stage3_param_persistence_threshold": 0}])
def test_a_recomputation_may_stop_inside_a_module(residency, ranks2):
    want = by_hand(EndsInALayer(), 2, 4, plain_loss)
    for got in ranks2.run(train_stopped_early, residency):
        agree(got, want)


def edits(rank):
    engine = start(net_of(), **({"bf16": {"enabled": True}}))
    weight = engine.module[0].weight
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0), torch.no_grad():
        weight.fill_(3.0 + rank)
    with deepspeed.zero.GatheredParameters([weight]):
        kept = weight.float().unique().tolist()
    engine.backward(engine(x_of(rank, 0).bfloat16()).float().sum() * 0.0)
    engine.step()
    with deepspeed.zero.GatheredParameters([weight]):
        after = weight.float().mean().item()
    return kept, after


def test_one_ranks_edit_reaches_all_ranks_and_the_masters(ranks2):
    for kept, after in ranks2.run(edits):
        assert kept == [3.0]
        assert after == pytest.approx(3.0, abs=0.02)


def overlapping(rank):
    engine = start(net_of(), {**NOTHING_STAYS, "enable_sanity_checks": True})
    weight = engine.module[0].weight
    messages = []
    with deepspeed.zero.GatheredParameters(weight), deepspeed.zero.GatheredParameters([weight]):
        pass
    with deepspeed.zero.GatheredParameters(weight):
        try:
            with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
                pass
        except RuntimeError as error:
            messages.append(str(error))
    try:
        with deepspeed.zero.GatheredParameters(weight), torch.no_grad():
            weight.add_(1)
    except RuntimeError as error:
        messages.append(str(error))
    with deepspeed.zero.GatheredParameters([]), deepspeed.zero.GatheredParameters(torch.ones(2)):
        pass
    return messages, weight.numel()


def test_overlapping_and_lost_edits_are_refused(ranks2):
    for (overlap, lost), numel in ranks2.run(overlapping):
        assert "overlapping" in overlap and "modifier_rank" in lost and numel == 0


def built_inside(rank):
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    plain_init, plain_empty = torch.nn.Linear.__init__, torch.empty
    with deepspeed.zero.Init(config_dict_or_path=config):

        class Late(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = torch.nn.Linear(3, 5)
                self.scale = torch.nn.Parameter(torch.ones(4))
                assert self.scale.numel() == 4 and self.inner.weight.numel() == 0

        torch.manual_seed(rank)
        net = Late()
    restored = torch.nn.Linear.__init__ is plain_init and torch.empty is plain_empty
    try:
        with deepspeed.zero.Init(config_dict_or_path=config):
            raise KeyError
    except KeyError:
        restored = restored and torch.nn.Linear.__init__ is plain_init
    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        values = [p.detach().clone() for p in net.parameters()]
    return restored, [p.numel() for p in net.parameters()], values


def test_modules_built_inside_init_are_sharded_at_once(ranks2):
    (restored, numels, first), (again, _, second) = ranks2.run(built_inside)
    assert restored and again and numels == [0, 0, 0]
    assert [tuple(v.shape) for v in first] == [(4,), (5, 3), (5,)]
    assert all(v.dtype == torch.bfloat16 for v in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train_built_inside(rank):
    with deepspeed.zero.Init(dtype=torch.float32):
        net = net_of()
    with (
        deepspeed.zero.GatheredParameters(list(net.parameters()), modifier_rank=0),
        torch.no_grad(),
    ):
        for p, q in zip(net.parameters(), net_of().parameters(), strict=True):
            p.copy_(q)
    engine = start(net)
    for step in range(3):
        engine.backward(plain_loss(engine, rank, step))
        engine.step()
    return whole(engine)


def test_a_model_built_inside_init_trains(ranks2):
    want = by_hand(net_of(), 2, 3, plain_loss)
    for got in ranks2.run(train_built_inside):
        agree(got, want)


class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.good = torch.nn.Linear(7, 7)
        self.fail = False

    def forward(self, x):
        x = self.good(x)
        if self.fail:
            raise ValueError("a bad batch")
        return x


def fails_once(rank):
    engine = start(Broken())
    engine.module.fail = True
    try:
        engine(x_of(rank, 0))
    except ValueError as error:
        assert "bad batch" in str(error)
    left = [p.numel() for p in engine.module.parameters()]
    engine.module.fail = False
    engine.backward(engine(x_of(rank, 0)).sum())
    engine.step()
    return left, engine.was_step_applied()


def test_after_a_forward_pass_that_raised_training_goes_on(ranks2):
    assert ranks2.run(fails_once) == [([0, 0], True)] * 2


def serve(rank):
    engine = start(net_of(), optimizer=False)
    with torch.no_grad():
        through_engine = engine(x_of(0, 0))
        through_module = engine.module(x_of(0, 0))
    return (
        type(engine.optimizer).__name__,
        through_engine,
        through_module,
        [p.numel() for p in engine.module.parameters()],
    )


def test_without_an_optimizer_the_module_serves(ranks2):
    want = net_of()(x_of(0, 0))
    for kind, a, b, left in ranks2.run(serve):
        assert kind == "DeepSpeedZeRoOffload" and left == [0] * 6
        torch.testing.assert_close(a, want)
        torch.testing.assert_close(b, want)


def no_sync_windows(rank):
    engine = start(net_of(), gradient_accumulation_steps=2)
    for step in range(4):
        loss = plain_loss(engine, rank, step)
        if step % 2 == 0:
            with engine.no_sync():
                engine.backward(loss)
        else:
            engine.backward(loss)
        engine.step()
    return whole(engine)


def test_no_sync_is_legal(ranks2):
    def loss(net, rank, step):
        return (plain_loss(net, rank, 2 * step) + plain_loss(net, rank, 2 * step + 1)) / 2

    want = by_hand(net_of(), 2, 2, loss)
    for got in ranks2.run(no_sync_windows):
        agree(got, want)


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def autocast_loss(net, rank, step):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x_of(rank, step)).float().square().mean()


def narrow_gathers(rank, recompute):
    ahead = {**NOTHING_STAYS, "stage3_prefetch_bucket_size": 60, "stage3_max_live_parameters": 60}
    engine = start(net_of(), ahead, communication_data_type="fp32", **AUTOCAST)
    first = engine.module[0].weight
    seen, sent, inside = [], [], []

    def look(module, args):
        seen.append((module.weight.detach().clone(), module.bias.detach().clone()))
        with deepspeed.zero.GatheredParameters(first):
            inside.append(first.detach().clone())

    def recorded(out, shard, axis, async_op=False):
        sent.append(shard.dtype)
        return gather(out, shard, axis, async_op)

    start_values = whole(engine)[0]
    engine.module[0].register_forward_pre_hook(look)
    gather, flat.all_gather_into = flat.all_gather_into, recorded
    for step in range(2):
        x = x_of(rank, step).requires_grad_()
        loss = (checkpoint(engine, x, use_reentrant=False) if recompute else engine(x)).float()
        engine.backward(loss.square().mean())
        engine.step()
    flat.all_gather_into = gather
    return seen, sent, (start_values, inside[0]), whole(engine)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_autocast_rounds_travels_rounded(recompute, ranks2):
    # Rounding twice is rounding once, so the results are those of a plain autocast loop.
    want = by_hand(net_of(), 2, 2, autocast_loss)
    for seen, sent, (exact, opened), got in ranks2.run(narrow_gathers, recompute):
        agree(got, want)
        for value in seen[0]:
            assert value.dtype == torch.float32
            assert torch.equal(value, value.bfloat16().float())
        # whoever is not computing sees all bits
        assert torch.equal(opened, exact) and not torch.equal(exact, exact.bfloat16().float())
        assert {torch.bfloat16, torch.float32} == set(sent)  # a LayerNorm is no safe module


def test_without_autocast_marked_params_travel_as_they_are(ranks2):
    for exact, used in ranks2.run(call_of_the_module_itself):
        assert torch.equal(exact, used)


def call_of_the_module_itself(rank):
    engine = start(net_of(), **AUTOCAST)
    exact, used = whole(engine)[0], []
    engine.module[0].register_forward_pre_hook(
        lambda m, args: used.append(m.weight.detach().clone())
    )
    with torch.no_grad():
        engine.module(x_of(rank, 0))
    return exact, used[0]
