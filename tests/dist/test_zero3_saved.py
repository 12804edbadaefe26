# SPDX-License-Identifier: Apache-2.0
"""What autograd saves of gathered parameters: notes instead of memory, the same gradients, the same complaints."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from deepspeed.runtime.zero import saved_weights, sharded_param
from tests.dist.test_zero3 import agree, by_hand, start, whole, x_of

KEEPS_BUFFERS = saved_weights._top_hooks is None  # older torch: nothing to test but the results


class Views(torch.nn.Module):
    """Layers whose backward passes look at weights as they are, transposed, in parts and of other modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first = torch.nn.Linear(7, 12)
        self.frozen = torch.nn.Linear(12, 12)
        self.frozen.requires_grad_(False)
        self.joined = torch.nn.Parameter(torch.randn(2 * 12, 12) * 0.3)
        self.last = torch.nn.Linear(12, 12, bias=False)
        self.how = "plain"

    def block(self, x):
        x = torch.tanh(self.frozen(x))
        left, right = (self.joined * 1.0 if self.how == "copied" else self.joined).chunk(2)
        x = x @ left.t() + torch.nn.functional.linear(x, right)
        return x + self.last(torch.tanh(self.last(x)))

    def forward(self, x):
        x = self.first(x)
        if self.how in ("reentrant", "not-reentrant"):
            x = checkpoint(self.block, x, use_reentrant=self.how == "reentrant")
        else:
            x = self.block(x)
        # the frozen weight once more, by another module's hands
        return torch.nn.functional.linear(x, self.frozen.weight.t())


def loss_of(net, rank, step):
    return net(x_of(rank, step)).square().sum()


def left_of(buffers):
    """How many buffers stay; gloo's own threads may hold one for a moment."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and not all(buffer.expired() for buffer in buffers):
        time.sleep(0.001)
    return sum(not buffer.expired() for buffer in buffers)


def train(rank, how, extra):
    net = Views()
    net.how = how
    engine = start(net, extra)
    if how == "compiled":
        engine.compile(backend="aot_eager")
        # where a graph ends at a hook, the compiler asks every tensor for its gradient
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    buffers, plain = [], sharded_param._become_whole

    def watched(param, values):
        plain(param, values)
        buffers.append(StorageWeakRef(param.untyped_storage()))

    sharded_param._become_whole = watched
    held = []
    try:
        for step in range(3):
            loss = loss_of(engine, rank, step)
            held.append(left_of(buffers))
            engine.backward(loss, retain_graph=step == 1 and how != "compiled")
            engine.step()
    finally:
        sharded_param._become_whole = plain
    return whole(engine), held


@pytest.mark.parametrize("how", ["plain", "copied", "reentrant", "not-reentrant", "compiled"])
def test_gathered_memory_goes_after_the_forward_pass_and_gradients_stay(how, ranks2):
    want = by_hand(Views(), 2, 3, loss_of)
    for got, held in ranks2.run(train, how, None):
        agree(got, want)
        # The first pass learns which other modules' weights are used.
        assert held[1:] == [0, 0] or KEEPS_BUFFERS


def test_looking_ahead_and_saving_notes_go_together(ranks2):
    want = by_hand(Views(), 2, 3, loss_of)
    for got, _ in ranks2.run(train, "plain", {"stage3_param_persistence_threshold": 20}):
        agree(got, want)


class ChangesInPlace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.layer = torch.nn.Linear(7, 7)

    def forward(self, x):
        saved = x * 1.0
        out = self.layer(saved)
        saved.add_(1.0)
        return out


def mistakes(rank):
    engine = start(ChangesInPlace())
    said = []
    try:
        engine(x_of(rank, 0).requires_grad_()).sum().backward()
    except RuntimeError as error:
        said.append(str(error))
    net = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.Linear(7, 7))
    engine = start(net)
    stale = engine(x_of(rank, 0)).sum()
    engine.backward(engine(x_of(rank, 0)).sum())
    engine.step()
    try:
        engine.backward(stale)
    except RuntimeError as error:
        said.append(str(error))
    return said


@pytest.mark.skipif(KEEPS_BUFFERS, reason="torch before 2.7 saves views as they are")
def test_mistakes_are_still_found(ranks2):
    for in_place, stale in ranks2.run(mistakes):
        assert "changed in place" in in_place or "inplace" in in_place
        assert "backward() before step()" in stale


def interrupted(rank):
    engine = start(Views())
    engine(x_of(rank, 0))
    plain = engine.module.last.forward

    def interrupt(x):
        raise KeyboardInterrupt

    engine.module.last.forward = interrupt
    try:
        engine(x_of(rank, 0))
    except KeyboardInterrupt:
        pass
    engine.module.last.forward = plain
    engine.backward(loss_of(engine, rank, 0))
    engine.step()
    watchers = None if KEEPS_BUFFERS else saved_weights._top_hooks(True)
    return watchers, whole(engine)


def test_after_an_interruption_nobody_watches(ranks2):
    want = by_hand(Views(), 2, 1, loss_of)
    for watchers, got in ranks2.run(interrupted):
        assert watchers is None
        agree(got, want)
