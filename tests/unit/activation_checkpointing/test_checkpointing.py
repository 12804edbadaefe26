# SPDX-License-Identifier: Apache-2.0
"""Checkpointed blocks against the same blocks run plainly: values, gradients, random numbers, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.activation_checkpointing.rng import RngSnapshot
from deepspeed.runtime.activation_checkpointing.saved import Arena, Kept, Policy

BOTH = pytest.mark.parametrize(
    "checkpoint", [checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint]
)


@pytest.fixture(autouse=True)
def fresh_settings():
    yield
    checkpointing.configure(None)
    checkpointing._settings.configured = False
    checkpointing.get_cuda_rng_tracker().reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        return x + self.b(self.drop(torch.nn.functional.gelu(self.a(x))))


def three_blocks(call, seed=3):
    torch.manual_seed(seed)
    blocks = nn.ModuleList([Block() for _ in range(3)])
    x = torch.randn(4, 6, requires_grad=True)
    y = x
    for block in blocks:
        y = call(block, y)
    after = torch.rand(3)
    y.square().sum().backward()
    return y.detach(), x.grad, [p.grad for p in blocks.parameters()], after, torch.rand(3)


def plain(function, *args, **kwargs):
    return function(*args, **kwargs)


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partition_activations": True},
        {"checkpoint_in_cpu": True},
        {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": 3},
        {"partition_activations": True, "contiguous_checkpointing": True, "num_checkpoints": 1},
        {"synchronize": True, "profile": True},
    ],
)
def test_equals_plain_execution_bit_for_bit_with_dropout(checkpoint, options):
    checkpointing.configure(None, **options)
    got, want = three_blocks(checkpoint), three_blocks(plain)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@BOTH
def test_nested_arguments_and_results_keep_their_shape(checkpoint):
    weight = torch.randn(3, 3, requires_grad=True)

    def block(pair, table, flag, nothing, *, scale):
        assert flag == "on" and nothing is None
        first, (second, index) = pair
        mixed = first @ weight * scale + second[index] + table["bias"]
        return {"out": mixed, "extras": [index + 1, None, 7]}, mixed.sum()

    def run(call):
        torch.manual_seed(0)
        first, second, bias = (torch.randn(3, 3, requires_grad=True) for _ in range(3))
        index = torch.tensor([2, 0, 1])
        out, total = call(
            block, (first, (second, index)), {"bias": bias}, "on", None, scale=torch.tensor(2.0)
        )
        weight.grad = None
        (out["out"].square().sum() + total).backward()
        return out["out"].detach(), out["extras"], [first.grad, second.grad, bias.grad, weight.grad]

    got, want = run(checkpoint), run(plain)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    assert torch.equal(got[1][0], want[1][0]) and got[1][1:] == [None, 7]
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("kind", [tuple, list])
def test_result_has_the_type_that_the_function_gives(checkpoint, kind):
    x = torch.ones(2, requires_grad=True)
    result = checkpoint(lambda t: kind([t * 2, t * 3]), x)
    assert type(result) is kind
    result[1].sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


@BOTH
def test_result_that_is_the_argument_and_one_given_twice(checkpoint):
    x = torch.ones(2, requires_grad=True)
    same, twice, again = checkpoint(lambda t: (t, *([t * 3] * 2)), x)
    (same + twice + again).sum().backward()
    assert x.grad.tolist() == [7.0, 7.0]


@BOTH
def test_parameters_get_gradients_when_no_input_asks_for_one(checkpoint):
    layer = nn.Linear(4, 4)
    checkpoint(layer, torch.ones(2, 4)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 2.0))


@BOTH
def test_frozen_block_of_frozen_inputs_has_no_graph(checkpoint):
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert not checkpoint(layer, torch.ones(2, 4)).requires_grad


@BOTH
def test_no_grad_runs_the_function_once_and_keeps_nothing(checkpoint):
    calls = []
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        out = checkpoint(lambda t: calls.append(1) or t * 2, x)
    assert not out.requires_grad and calls == [1]


@BOTH
def test_block_runs_a_second_time_in_backward_only(checkpoint):
    calls = []
    x = torch.ones(2, requires_grad=True)
    out = checkpoint(lambda t: calls.append(torch.is_grad_enabled()) or t.exp(), x)
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2 and calls[1] is True


@BOTH
@pytest.mark.parametrize("contiguous", [False, True])
def test_inner_activations_are_never_kept_and_inputs_go_with_backward(checkpoint, contiguous):
    if contiguous:
        checkpointing.configure(
            None, partition_activations=True, contiguous_checkpointing=True, num_checkpoints=1
        )
    inner, inputs = [], []

    def block(t):
        hidden = t.sin()
        inner.append(weakref.ref(hidden))
        return hidden.exp()

    leaf = torch.ones(64, requires_grad=True)
    x = leaf * 2
    inputs.append(weakref.ref(x))
    out = checkpoint(block, x)
    del x
    gc.collect()
    assert inner[0]() is None
    loss = out.sum()
    loss.backward()
    gc.collect()
    assert inner[1]() is None and inputs[0]() is None
    if contiguous:
        shelf = next(iter(checkpointing._arena._shelves.values()))
        assert shelf.free == [0]
    assert loss.requires_grad  # the graph itself is still held, only what it saved is gone


@BOTH
def test_backward_twice_with_retained_graph(checkpoint):
    checkpointing.configure(
        None, partition_activations=True, contiguous_checkpointing=True, num_checkpoints=2
    )
    x = torch.rand(5, requires_grad=True)
    out = checkpoint(torch.sin, x).sum()
    out.backward(retain_graph=True)
    out.backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().cos(), rtol=1e-6, atol=0)


@BOTH
def test_checkpoint_inside_checkpoint(checkpoint):
    def outer(block, t):
        return checkpoint(block, t) * 2

    def run(call):
        torch.manual_seed(1)
        block, x = Block(), torch.randn(4, 6, requires_grad=True)
        call(outer, block, x).sum().backward()
        return x.grad, [p.grad for p in block.parameters()]

    torch.testing.assert_close(run(checkpoint), run(plain), rtol=0, atol=0)


@BOTH
def test_autocast_holds_in_the_second_run(checkpoint):
    def run(call):
        torch.manual_seed(2)
        block, x = Block(), torch.randn(4, 6, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(block, x)
        out.float().sum().backward()
        return x.grad, [p.grad for p in block.parameters()]

    torch.testing.assert_close(run(checkpoint), run(plain), rtol=0, atol=0)


def test_autograd_grad_works_without_reentry_and_says_so_with_it():
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpointing.non_reentrant_checkpoint(torch.exp, x).sum(), [x])
    torch.testing.assert_close(grad, torch.ones(2).exp())
    out = checkpointing.checkpoint(torch.exp, x).sum()
    with pytest.raises(RuntimeError, match="non_reentrant_checkpoint"):
        torch.autograd.grad(out, [x])


@BOTH
def test_input_written_to_before_backward_is_an_error(checkpoint):
    x = torch.ones(2, requires_grad=True) * 1
    out = checkpoint(lambda t: t * t, x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        out.sum().backward()


def test_error_inside_the_block_reaches_the_caller_and_leaves_random_numbers_alone():
    x = torch.ones(2, requires_grad=True)
    armed = []

    def block(t):
        if armed:
            torch.rand(7)
            raise ArithmeticError("inside")
        return t * torch.rand(2)

    out = checkpointing.checkpoint(block, x)
    armed.append(1)
    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="inside"):
        out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# - streams of random numbers


def test_tracker_forks_a_stream_of_its_own():
    tracker = checkpointing.get_cuda_rng_tracker()
    torch.manual_seed(11)
    tracker.add("mine", 5)
    outside = torch.rand(2)
    with tracker.fork("mine"):
        first = torch.rand(2)
    with tracker.fork("mine"):
        second = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(2), torch.rand(2)]))
    torch.manual_seed(11)
    assert torch.equal(torch.rand(2), outside)


def test_tracker_refuses_a_name_or_a_seed_twice_and_an_unknown_name():
    tracker = checkpointing.get_cuda_rng_tracker()
    tracker.add("mine", 5)
    with pytest.raises(Exception, match="cuda rng state mine already exists"):
        tracker.add("mine", 6)
    with pytest.raises(Exception, match="seed 5 already exists"):
        tracker.add("other", 5)
    with pytest.raises(Exception, match="model-parallel-rng is not added"), tracker.fork():
        pass


def test_states_can_be_put_back():
    tracker = checkpointing.get_cuda_rng_tracker()
    tracker.add("mine", 5)
    states = tracker.get_states()
    with tracker.fork("mine"):
        first = torch.rand(2)
    tracker.set_states(states)
    with tracker.fork("mine"):
        assert torch.equal(torch.rand(2), first)


class Mpu:
    """Rank 3 of 4."""

    get_model_parallel_rank = staticmethod(lambda: 3)
    get_model_parallel_world_size = staticmethod(lambda: 4)


def test_model_parallel_seed_is_the_ranks_own():
    checkpointing.configure(Mpu())
    checkpointing.model_parallel_cuda_manual_seed(100)
    outside = torch.rand(2)
    with checkpointing.get_cuda_rng_tracker().fork():
        inside = torch.rand(2)
    torch.manual_seed(100)
    assert torch.equal(torch.rand(2), outside)
    torch.manual_seed(100 + 2718 + 3)
    assert torch.equal(torch.rand(2), inside)
    checkpointing.model_parallel_reconfigure_tp_seed(200)
    with checkpointing.get_cuda_rng_tracker().fork():
        again = torch.rand(2)
    torch.manual_seed(200 + 2718 + 3)
    assert torch.equal(torch.rand(2), again)


@BOTH
def test_stream_inside_a_block_is_drawn_again_and_then_goes_on(checkpoint):
    tracker = checkpointing.get_cuda_rng_tracker()

    def block(t):
        with tracker.fork("mine"):
            return t * torch.rand(4)

    def run(call):
        tracker.reset()
        tracker.add("mine", 9)
        x = torch.ones(4, requires_grad=True)
        y = call(block, x)
        y.sum().backward()
        with tracker.fork("mine"):
            return y.detach(), x.grad, torch.rand(2)

    got = run(checkpoint)
    torch.testing.assert_close(got, run(plain), rtol=0, atol=0)
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=0)


def test_snapshot_leaves_no_trace():
    snapshot = RngSnapshot.take()
    want = torch.rand(3)
    with snapshot.restored():
        assert torch.equal(torch.rand(3), want)
    after = torch.rand(3)
    torch.set_rng_state(snapshot.cpu)
    torch.rand(3)
    assert torch.equal(torch.rand(3), after)


# - settings


def test_door_and_state():
    assert deepspeed.checkpointing is checkpointing
    assert not checkpointing.is_configured()
    checkpointing.configure(None)
    assert checkpointing.is_configured()


def test_section_is_read_and_arguments_win():
    section = {
        "partition_activations": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": 4,
        "cpu_checkpointing": True,
    }
    config = {"train_batch_size": 1, "activation_checkpointing": section}
    checkpointing.configure(None, deepspeed_config=config, num_checkpoints=2)
    got = checkpointing._settings
    assert (got.partition, got.contiguous, got.num_checkpoints, got.on_host) == (
        True,
        True,
        2,
        True,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contiguous_checkpointing": True, "num_checkpoints": 2}, "partition_activations"),
        ({"contiguous_checkpointing": True, "partition_activations": True}, "num_checkpoints"),
    ],
)
def test_contiguous_buffers_need_their_companions(options, words):
    with pytest.raises(AssertionError, match=words):
        checkpointing.configure(None, **options)
    assert not checkpointing.is_configured()


def test_setters():
    checkpointing.partition_activations_in_checkpoint(True)
    checkpointing.set_num_layers(5)
    assert checkpointing._settings.partition and checkpointing._settings.num_checkpoints == 5


def test_rows_are_used_again_and_more_blocks_than_rows_still_work():
    from deepspeed.comm.mesh import Axis

    arena = Arena(rows=1)
    policy = Policy(Axis.alone(), arena=arena)
    first = Kept(torch.arange(4.0), policy, 0)
    second = Kept(torch.arange(4.0) + 10, policy, 0)
    assert first.restore().tolist() == [0, 1, 2, 3] and second.restore().tolist() == [
        10,
        11,
        12,
        13,
    ]
    address = first.values.data_ptr()
    del first
    third = Kept(torch.arange(4.0) + 20, policy, 0)
    assert third.values.data_ptr() == address
    assert third.restore().tolist() == [20, 21, 22, 23]


def test_settings_are_variables_of_the_module():
    before = checkpointing._settings
    try:
        checkpointing.configure(None, checkpoint_in_cpu=True, num_checkpoints=3)
        seen = checkpointing.CPU_CHECKPOINT, checkpointing.num_layers, checkpointing.mpu
        assert seen == (True, 3, None)
        checkpointing.CPU_CHECKPOINT = False
        assert not checkpointing._policy().on_host
    finally:
        checkpointing._settings = before
