# SPDX-License-Identifier: Apache-2.0
"""Inputs of checkpointed layers that wait on the host: which go, which stay, and that gradients do not change."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepspeed.runtime.activation_checkpointing import offload_activations
from deepspeed.runtime.activation_checkpointing.offload_activations import (
    CheckpointHiddenStatesOffload,
    get_checkpoint_hidden_states_offloading_ctx_manager,
)

DEPTH = 4


class Everywhere(CheckpointHiddenStatesOffload):
    """Takes a CPU tensor for one on a device, which here is all there is."""

    def _should_skip(self, tensor):
        return offload_activations._overlaps_itself(tensor)


@pytest.fixture
def layers():
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(DEPTH))


def loss_of(layers, x, manager=None):
    for layer in layers:
        if manager is not None:
            manager.mark(x)
        x = checkpoint(layer, x, use_reentrant=False)
    return x.square().sum()


def grads_of(layers, x, manager=None, **options):
    x = x.detach().requires_grad_()
    for param in layers.parameters():
        param.grad = None
    loss_of(layers, x, manager).backward(**options)
    return [x.grad, *(param.grad for param in layers.parameters())]


@pytest.mark.parametrize("kept", [0, 1, DEPTH + 1])
def test_gradients_are_those_of_tensors_that_stayed(layers, kept):
    x = torch.randn(3, 4)
    wanted = grads_of(layers, x)
    manager = Everywhere(keep_last_count=kept, min_offload_bytes=0)
    for turn in (1, 2):
        with manager:
            torch.testing.assert_close(grads_of(layers, x, manager), wanted, rtol=0, atol=0)
        stays = min(kept, DEPTH)
        stats = manager.stats
        assert stats.marked_tensors == turn * DEPTH
        assert stats.offloaded_tensors == stats.restored_tensors == turn * (DEPTH - stays)
        assert stats.kept_last_tensors == turn * stays
        assert not manager._tracker and not manager._keep_last
        assert manager._cpu_buffer_pool_count == DEPTH - stays  # the second turn used them again


def test_a_second_backward_pass_over_one_graph(layers):
    x = torch.randn(3, 4, requires_grad=True)
    manager = Everywhere(keep_last_count=1)
    with manager:
        loss = loss_of(layers, x, manager)
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert (manager.stats.restored_tensors, manager.stats.kept_last_tensors) == (DEPTH - 1, 1)


def test_views_come_back_with_their_strides():
    base = torch.randn(6, 8)
    for view, taken in ((base[:, ::2], 1), (base[2:].t(), 1), (base[:1].expand(4, 8), 0)):
        x = view.detach().requires_grad_()
        seen = []

        def note(y, seen=seen):
            seen.append(y.stride())
            return y.sin().square()

        manager = Everywhere(keep_last_count=0)
        with manager:
            manager.mark(x)
            checkpoint(note, x, use_reentrant=False).sum().backward()
        assert manager.stats.offloaded_tensors == taken
        assert seen == [x.stride()] * 2
        torch.testing.assert_close(x.grad, 2 * x.sin() * x.cos().detach())


def test_tensors_on_the_host_and_unmarked_ones_stay(layers):
    x = torch.randn(3, 4)
    manager = get_checkpoint_hidden_states_offloading_ctx_manager()
    with manager:
        grads_of(layers, x, manager)
        seen = manager.stats.saved_tensors_seen
        grads_of(layers, x)
    stats = manager.stats
    assert (stats.skipped_marked_tensors, stats.offloaded_tensors) == (DEPTH, 0)
    assert stats.saved_tensors_seen > seen


def test_a_kept_tensor_that_was_changed_is_not_used(layers):
    x = torch.randn(3, 4, requires_grad=True)
    manager = Everywhere(keep_last_count=1)
    with manager:
        hidden = x * 2
        manager.mark(hidden)
        loss = checkpoint(layers[0], hidden, use_reentrant=False).sum()
        hidden.add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()


def test_what_cannot_be():
    with pytest.raises(ValueError, match="keep_last_count"):
        CheckpointHiddenStatesOffload(keep_last_count=-1)
    manager = CheckpointHiddenStatesOffload()
    with manager, pytest.raises(RuntimeError, match="not re-entrant"):
        manager.__enter__()


def test_layers_of_transformers_mark_their_inputs_inside_the_context_only(monkeypatch):
    class Layer(nn.Module):
        gradient_checkpointing = True

        def forward(self, hidden_states):
            return hidden_states.sin()

    monkeypatch.setitem(
        sys.modules,
        "transformers.modeling_layers",
        SimpleNamespace(GradientCheckpointingLayer=Layer),
    )
    original, layer, x = Layer.__call__, Layer(), torch.randn(2, requires_grad=True)
    outer, inner = CheckpointHiddenStatesOffload(), CheckpointHiddenStatesOffload()
    with outer:
        layer(x)
        with inner:
            layer(hidden_states=x)
        layer.eval()(x)
        with pytest.raises(KeyError), inner:
            raise KeyError
        assert Layer.__call__ is not original
    assert Layer.__call__ is original
    layer.train()(x)
    assert (outer.stats.marked_tensors, inner.stats.marked_tensors) == (1, 1)
