# SPDX-License-Identifier: Apache-2.0
"""ZeRO++ on four gloo ranks: second copies near by (hpZ), quantized gathers (qwZ) and gradients (qgZ, LoCo), frozen codes."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.comm import flat
from deepspeed.runtime.comm.coalesced_collectives import (
    all_to_all_loco_quant_reduce,
    all_to_all_quant_reduce,
    reduce_scatter_coalesced,
)
from deepspeed.runtime.zero.codec import SliceCodec
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.quantized_sum import QuantizedSum, RowCodec

RANKS, STEPS = 4, 2
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def config(zero, lr=0.05, **extra):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, **NOTHING_STAYS, **zero},
        **extra,
    }


class Net(torch.nn.Module):
    def __init__(self, kind=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(13, 31)
        self.middle = torch.nn.ModuleList(torch.nn.Linear(31, 31) for _ in range(2))
        self.last = torch.nn.Linear(31, 3, bias=False)
        self.kind = kind

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.middle:
            if self.kind is None or not torch.is_grad_enabled():
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda v, f=layer: torch.tanh(f(v)), x, use_reentrant=self.kind)
        return self.last(x)


def x_of(rank, step):
    return torch.randn(2, 13, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(net, rank, step):
    return (net(x_of(rank, step)) - 1.0).square().mean()


def start(zero, net=None, **extra):
    net = Net() if net is None else net
    return deepspeed.initialize(model=net, config=config(zero, **extra))[0]


def train(engine, rank, steps=STEPS, accumulate=1):
    losses = []
    for step in range(steps):
        for micro in range(accumulate):
            loss = loss_of(engine, rank + 7 * micro, step)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        if step == 0:
            engine.eval()
            with torch.no_grad():
                engine(x_of(rank, 5))
            engine.train()
    return losses


def whole(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [p.detach().clone() for p in engine.module.parameters()]


# - hpZ

CELLS = {
    "plain": ({}, None, {}),
    "accumulated": ({}, None, {"gradient_accumulation_steps": 2}),
    "reentrant recomputation": ({}, True, {}),
    "recomputation": ({}, False, {}),
    "what stays by default": (
        dict.fromkeys(NOTHING_STAYS, 100) | {"stage3_max_live_parameters": 10**6},
        None,
        {},
    ),
    "slices on the host, bf16": (
        {"offload_param": {"device": "cpu"}},
        None,
        {"bf16": {"enabled": True}},
    ),
}


def counted_gathers(engine, rank):
    """Over how many ranks gathers went, before the backward pass and in it."""
    sizes, plain = [], flat.all_gather_into

    def count(out, shard, axis, async_op=False):
        sizes.append(axis.size)
        return plain(out, shard, axis, async_op)

    flat.all_gather_into = count
    try:
        loss = loss_of(engine, rank, 0)
        there = list(sizes)
        engine.backward(loss)
        return there, sizes[len(there) :]
    finally:
        flat.all_gather_into = plain


def second_copies(rank):
    found = {}
    for name, (zero, kind, extra) in CELLS.items():
        runs = []
        for second in (1, 2):
            engine = start({"zero_hpz_partition_size": second, **zero}, Net(kind), **extra)
            if "bf16" in extra:
                engine.module.forward = lambda x, f=engine.module.forward: f(x.bfloat16()).float()
            losses = train(engine, rank, accumulate=extra.get("gradient_accumulation_steps", 1))
            runs.append((losses, whole(engine)))
            gathers = counted_gathers(engine, rank)
            engine.destroy()
        found[name] = (runs, gathers)
    return found


def test_the_second_copy_changes_no_bit_and_serves_the_backward_pass(ranks4):
    for found in ranks4.run(second_copies):
        for name, (((losses, weights), (near_losses, near_weights)), gathers) in found.items():
            assert losses == near_losses, name
            for a, b in zip(weights, near_weights, strict=True):
                assert torch.equal(a, b), name
            forward, backward = gathers
            assert set(forward) == {4} and set(backward) <= {2}, name
            assert backward or "stays" in name


def edits_between_passes(rank):
    engine = start({"zero_hpz_partition_size": 2})
    train(engine, rank, steps=1)
    weight = engine.module.first.weight
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=1), torch.no_grad():
        weight.mul_(rank)
    edited = whole(engine)[0]
    loss = loss_of(engine, rank, 1)
    engine.backward(loss)
    near = [
        (
            p.ds_secondary_tensor.numel(),
            p.ds_secondary_tensor_group_size,
            p.ds_secondary_tensor_num_of_groups,
        )
        for p in engine.module.parameters()
    ]
    gradient = deepspeed.utils.safe_get_full_grad(engine.module.last.weight)
    return edited, gradient, near[0]


def test_an_edit_reaches_the_second_copy(ranks4):
    results = ranks4.run(edits_between_passes)
    for edited, gradient, near in results:
        assert torch.equal(edited, results[0][0]) and torch.equal(gradient, results[0][1])
        assert edited.abs().max() > 0 and near == (-(-13 * 31 // 2), 2, 2)


# - qwZ


def decoded(value, ranks=RANKS, bits=8):
    """What every rank sees of a value whose slices were encoded, one by one."""
    values = value.reshape(-1)
    piece = -(-values.numel() // ranks)
    codec = SliceCodec(piece, value.dtype, bits)
    padded = torch.zeros(ranks * piece, dtype=value.dtype)
    padded[: values.numel()] = values
    whole = torch.cat([codec.decode(codec.encode(row)) for row in padded.view(ranks, piece)])
    return whole[: values.numel()].view(value.shape)


def quantized_gathers(rank):
    engine = start({"zero_quantized_weights": True})
    first = whole(engine)
    losses = train(engine, rank, steps=12)
    both = start({"zero_quantized_weights": True, "zero_hpz_partition_size": 2})
    near = train(both, rank, steps=12)
    plain = train(start({}), rank, steps=12)
    return first, losses, near, plain


def test_gathers_carry_codes_and_training_goes_on(ranks4):
    results = ranks4.run(quantized_gathers)
    for got, want in zip(results[0][0], Net().parameters(), strict=True):
        want = want.detach()
        assert torch.equal(got, decoded(want) if want.dim() > 1 else want)
        # half a step of a group whose largest value is at most the largest of all, and two roundings of fp32
        assert (got - want).abs().max() <= want.abs().max() * (0.5 / 127 + 2**-22)
    for _, losses, near, plain in results:
        assert near == losses  # the backward pass sees the weights of the forward pass, exactly
        assert losses[0] == pytest.approx(plain[0], rel=0.05)
        assert losses[-1] < losses[0] * 0.7 and losses[-1] < plain[-1] + 0.1 * plain[0]


# - frozen weights as codes


def frozen_net():
    net = Net()
    net.requires_grad_(False)
    net.last.requires_grad_(True)
    return net


def keeps_codes(rank, folder):
    zero = {"zero_quantized_nontrainable_weights": True}
    engine = start(zero, frozen_net())
    kinds = {
        name: (p.ds_tensor.dtype, p.ds_tensor.numel())
        for name, p in engine.module.named_parameters()
    }
    before = whole(engine)
    engine.optimizer.quantize_nontrainable_params()  # which has been done
    losses = train(engine, rank, steps=10)
    engine.save_checkpoint(folder, tag="t")
    after = whole(engine)
    other = start(zero, frozen_net())
    with deepspeed.zero.GatheredParameters(list(other.module.parameters()), modifier_rank=0):
        for p in other.module.parameters():
            p.data.zero_()
    zeroed = whole(other)[0].abs().max().item()
    other.load_checkpoint(folder, tag="t")
    return kinds, before, losses, after, zeroed, whole(other)


def test_frozen_matrices_are_kept_as_codes(ranks4, tmp_path):
    kinds, before, losses, after, zeroed, loaded = ranks4.run(keeps_codes, str(tmp_path))[0]
    assert kinds["first.weight"] == (torch.uint8, SliceCodec(101, torch.float32).nbytes)
    assert kinds["first.bias"] == (torch.float32, 8) and kinds["last.weight"] == (torch.float32, 24)
    names = [name for name, _ in Net().named_parameters()]
    for name, got, want in zip(names, before, Net().parameters(), strict=True):
        packed = name.endswith("weight") and name != "last.weight"
        assert torch.equal(got, decoded(want.detach()) if packed else want.detach()), name
    for name, was, now in zip(names, before, after, strict=True):
        assert torch.equal(was, now) != (name == "last.weight"), name
    assert losses[-1] < losses[0] and zeroed == 0.0
    for now, again in zip(after, loaded, strict=True):
        # a code is decoded, saved, and encoded with the scale of decoded values: the same code, a scale one rounding off
        torch.testing.assert_close(again, now, rtol=2**-20, atol=0.0)


def from_init(rank):
    cfg = config({})
    near = deepspeed.utils.groups
    near._create_zero_param_parallel_group(2)
    with deepspeed.zero.Init(
        config_dict_or_path=cfg,
        zero_param_parallel_group=near._get_zero_param_intra_parallel_group(),
        zero_quantized_weights=True,
        tensor_overrides=[deepspeed.zero.DeepSpeedTensorOverride.device],
    ):
        made = torch.ones(2, dtype=torch.float64)
        net = Net()
    weight, bias = net.first.weight, net.first.bias
    kinds = (weight.ds_wire is not None, bias.ds_wire is not None, weight.ds_second.axis.size)
    with deepspeed.zero.GatheredParameters(weight):
        return made.dtype, kinds, weight.detach().clone()


def test_init_takes_the_arguments_of_zeropp(ranks4):
    for dtype, kinds, weight in ranks4.run(from_init):
        assert dtype == torch.float64 and kinds == (True, False, 2)
        assert torch.equal(weight, decoded(Net().first.weight.detach()))


# - qgZ


def gradient_rows(rank, numel):
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank - 2)


def sums(rank, row):
    world = deepspeed.utils.groups.current_mesh().world
    codec = RowCodec.of(row, [(0, row - 5)], 4)
    full = gradient_rows(rank, RANKS * row)
    one, two = torch.empty(row), torch.empty(row)
    QuantizedSum(codec)(one, full, world)
    in_hops = replace(world, hops=world.split(2, world))
    QuantizedSum(codec)(two, full, in_hops, async_op=True).wait()
    plain, wide = torch.empty(row), torch.empty(RANKS * row)
    flat.reduce_scatter_into(plain, full, world)
    flat.all_gather_into(wide, plain, in_hops)
    return one, two, plain, wide


def test_sums_of_codes_are_off_by_half_a_step_a_rank(ranks4):
    row = 600
    results = ranks4.run(sums, row)
    full = torch.stack([gradient_rows(rank, RANKS * row) for rank in range(RANKS)]).view(
        RANKS, RANKS, row
    )
    want = full.double().sum(0)

    def bound(values):  # half a step of 4 bits in each group of 128
        padded = torch.nn.functional.pad(values[..., : row - 5].abs(), (0, -(row - 5) % 128))
        most = padded.unflatten(-1, (-1, 128)).amax(-1) / 14
        return most.repeat_interleave(128, -1)[..., : row - 5]

    for rank, (one, two, plain, wide) in enumerate(results):
        assert torch.equal(torch.cat([result[2] for result in results]), wide)
        torch.testing.assert_close(one[-5:], plain[-5:], rtol=1e-6, atol=1e-6)
        errors = bound(full[:, rank]).sum(0)
        assert ((one - want[rank]).abs()[:-5] <= errors * (1 + 1e-5)).all()
        # the second hop encodes sums of two ranks, which the first may have made larger by its own error
        again = bound(full[:, rank].view(2, 2, row).sum(1)).sum(0) + errors.max() / 7
        assert ((two - want[rank]).abs()[:-5] <= (errors + again) * (1 + 1e-5)).all()
        assert not torch.equal(one, plain) and not torch.equal(one, two)


GRADIENTS = {
    "codes": {},
    "with feedback": {"zeropp_loco_param": {"err_beta": 0.8, "reset_T": 1024}},
    "all three": {"zero_quantized_weights": True, "zero_hpz_partition_size": 2},
    "in smaller groups": {"mics_shard_size": 2},
    "in pieces": {"reduce_bucket_size": 700, "overlap_comm": True},
}


def quantized_gradients(rank):
    found = {"plain": train(start({}), rank, steps=16)}
    for name, zero in GRADIENTS.items():
        engine = start({"zero_quantized_gradients": True, **zero})
        found[name] = train(engine, rank, steps=16)
    os.environ["LOCAL_SIZE"] = "2"  # two machines of two ranks each
    try:
        engine = start({"zero_quantized_gradients": True})
        found["in two hops"] = train(engine, rank, steps=16)
        assert engine.mesh.state_axes[0].hops is not None
    finally:
        os.environ["LOCAL_SIZE"] = "4"
    half = start(
        {"zero_quantized_gradients": True}, fp16={"enabled": True, "initial_scale_power": 4}
    )
    weights = whole(half)
    x = x_of(rank, 0).half()
    half.backward(half(x).sum() * (float("inf") if rank == 2 else 1.0))
    half.step()
    kept = all(torch.equal(a, b) for a, b in zip(weights, whole(half), strict=True))
    return found, half.skipped_steps, kept, what_is_remembered(rank)


def what_is_remembered(rank):
    """Whether errors are kept: after a step, after an overflow, after a step, after another scale was set."""
    loco = {"zeropp_loco_param": {"err_beta": 0.8, "reset_T": 64}}
    engine = start(
        {"zero_quantized_gradients": True, **loco}, fp16={"enabled": True, "initial_scale_power": 4}
    )
    found = []
    for factor in (1.0, float("inf") if rank == 2 else 1.0, 1.0):
        engine.backward(engine(x_of(rank, 0).half()).sum() * factor)
        engine.step()
        found.append(remembers(engine))
    engine.optimizer.override_loss_scale(8.0)
    return [*found, remembers(engine)]


def remembers(engine):
    buckets = engine.optimizer.reducer._buckets
    return any(b._reduce._feedback[0]._error is not None for b in buckets)


def test_training_with_codes_of_gradients_goes_on(ranks4):
    for found, skipped, kept, remembered in ranks4.run(quantized_gradients):
        assert remembered == [True, False, True, False]
        plain = found.pop("plain")
        for name, losses in found.items():
            assert losses[0] == pytest.approx(plain[0], rel=0.05), name
            assert losses != plain and sum(losses[-5:]) < 2 * losses[0], name
            assert sum(losses[-5:]) < sum(plain[-5:]) + 0.5 * plain[0], name
        assert skipped == 1 and kept  # what overflowed on one rank is seen by all


def coalesced(rank):
    tensors = [
        torch.arange(5.0) * (rank + 1),
        torch.ones(2, 3) * (rank + 1) * 10,
        gradient_rows(rank, 40 * 30).view(40, 30),
    ]
    kept = [tensor.clone() for tensor in tensors]
    plain = reduce_scatter_coalesced(tensors)
    codes = all_to_all_quant_reduce(tensors, deepspeed.utils.groups._get_local_all_to_all_group())
    param = torch.nn.Parameter(torch.zeros(40, 30))
    lossy = []
    for _ in range(20):
        param.grad = tensors[2]
        lossy += all_to_all_loco_quant_reduce([param], None, {"err_beta": 0.0})
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    return plain, codes, torch.stack(lossy).mean(0)


def test_averages_of_several_tensors(ranks4):
    results = ranks4.run(coalesced)
    first = [result[0][0] for result in results]
    # as older versions cut it: equal slices, the last one shorter
    assert [part.tolist() for part in first] == [[0.0, 2.5], [5.0, 7.5], [10.0], []]
    whole_one = torch.cat([result[0][2] for result in results])
    want = sum(gradient_rows(rank, 1200).double() for rank in range(RANKS)) / RANKS
    torch.testing.assert_close(whole_one.double(), want, rtol=1e-5, atol=1e-5)
    for plain, codes, mended in results:
        assert torch.equal(codes[0], plain[0]) and codes[2].shape == plain[2].shape
        # 4 contributions of at most 40 (three sigma and a bit), half a step each
        assert 0 < (codes[2] - plain[2]).abs().max() < 40 / 14
        assert (mended - plain[2]).abs().mean() < (codes[2] - plain[2]).abs().mean() / 4


def by_itself(rank):
    net = Net().bfloat16().eval()
    x = x_of(0, 0).bfloat16()
    want = net(x).detach()
    offload = DeepSpeedZeRoOffload(
        net, None, None, param_persistence_threshold=40, prefetch_bucket_size=0
    )
    left = [p.numel() for p in net.parameters()]
    with torch.no_grad():
        same = torch.equal(net(x), want)
    kept = [p.numel() for p in offload.persistent_parameters]
    offload.empty_partition_cache()
    offload.destroy()
    return left, same, kept, [p.dtype for p in net.parameters()]


def test_stage_3_without_an_engine(ranks4):
    for left, same, kept, dtypes in ranks4.run(by_itself):
        assert left == [0] * 7 and same and kept == [31, 31, 31]
        assert set(dtypes) == {torch.bfloat16}
