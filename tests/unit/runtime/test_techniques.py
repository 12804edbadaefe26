# SPDX-License-Identifier: Apache-2.0
"""Curricula, dropped layers and the curvature of blocks: their numbers, and what the engine passes to the model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from deepspeed.runtime.eigenvalue import Eigenvalue
from deepspeed.runtime.engine import _eigenvalue_summary_events
from deepspeed.utils.errors import DeepSpeedConfigError


def curriculum(kind, low=2, high=10, **schedule):
    return {
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": kind,
        "schedule_config": schedule,
    }


LINEAR = curriculum("fixed_linear", total_curriculum_step=8, difficulty_step=2)


@pytest.mark.parametrize(
    ("config", "course"),
    [
        (LINEAR, [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]),
        (
            curriculum("fixed_root", total_curriculum_step=8, difficulty_step=2, root_degree=3),
            # 2 + 8 * (t / 8) ** (1 / 3) = 6, 7.04, 7.77, 8.35, 8.84, 9.27, 9.65, 10
            [6, 6, 6, 8, 8, 8, 8, 10, 10],
        ),
        (
            curriculum("fixed_discrete", 1, 3, difficulty=[1, 2, 3], max_step=[2, 4]),
            [1, 1, 2, 2, 3, 3],
        ),
    ],
)
def test_difficulties_grow_by_their_schedule(config, course):
    scheduler = CurriculumScheduler(config)
    assert scheduler.get_current_difficulty() == config["min_difficulty"]
    assert [scheduler.update_difficulty(step + 1) for step in range(len(course))] == course
    again = CurriculumScheduler(config)
    again.set_state(scheduler.get_state())
    assert again.get_current_difficulty() == course[-1]


def test_a_schedule_of_ones_own():
    scheduler = CurriculumScheduler(curriculum("custom"))
    with pytest.raises(RuntimeError, match="set_custom_get_difficulty"):
        scheduler.update_difficulty(1)
    scheduler.set_custom_get_difficulty(lambda step: min(step * 3, 10))
    assert [scheduler.update_difficulty(step) for step in (1, 2, 3, 4)] == [3, 6, 9, 10]


@pytest.mark.parametrize(
    ("config", "error", "word"),
    [
        ({"schedule_type": "fixed_linear"}, AssertionError, "min_difficulty"),
        (curriculum("quadratic"), ValueError, "unknown curriculum schedule"),
        (curriculum("fixed_linear", total_curriculum_step=8), AssertionError, "difficulty_step"),
        (
            curriculum("fixed_linear", total_curriculum_step=0, difficulty_step=2),
            AssertionError,
            "above 0",
        ),
        (
            curriculum("fixed_discrete", difficulty=[1, 2], max_step=[1, 2]),
            AssertionError,
            "one more",
        ),
        (curriculum("custom", 5, 4), AssertionError, "above 'max_difficulty'"),
    ],
)
def test_curricula_that_cannot_be(config, error, word):
    with pytest.raises(error, match=word) as raised:
        CurriculumScheduler(config)
    assert isinstance(raised.value, DeepSpeedConfigError)


class Listener(nn.Module):
    """Notes what its forward is given besides the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.heard = []

    def forward(self, x, **kwargs):
        self.heard.append(kwargs)
        return self.layer(x).sum()


def run(engine, steps):
    for _ in range(steps * engine.gradient_accumulation_steps()):
        engine.backward(engine(torch.ones(1, 2)))
        engine.step()


def start(**techniques):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam"},
        **techniques,
    }
    return deepspeed.initialize(model=Listener(), config=config)[0]


def test_the_model_is_told_the_lengths_of_a_curriculum(tmp_path):
    section = {"enabled": True, "curriculum_type": "seqlen", **LINEAR}
    engine = start(curriculum_learning=section)
    run(engine, 4)
    lengths = [kwargs["curriculum_seqlen"] for kwargs in engine.module.heard]
    assert lengths == [2, 2, 4, 4, 4, 4, 6, 6]  # both micro-batches of a step have one length
    engine.save_checkpoint(tmp_path, tag="t")
    other = start(curriculum_learning=section)
    other.load_checkpoint(tmp_path, tag="t")
    run(other, 2)
    assert [kwargs["curriculum_seqlen"] for kwargs in other.module.heard] == [6, 6, 8, 8]
    other.eval()
    other(torch.ones(1, 2))
    assert other.module.heard[-1] == {}


def test_a_pipelines_batches_can_be_cut_to_the_length_of_their_step():
    deepspeed.init_distributed()
    module = deepspeed.PipelineModule(
        [nn.Linear(2, 1)], num_stages=1, loss_fn=lambda out, _: out.sum()
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "Adam"},
        "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen", **LINEAR},
    }
    engine = deepspeed.initialize(model=module, config=config)[0]
    lengths = []

    def cut(pair):
        lengths.append(engine.curriculum_scheduler_legacy.get_current_difficulty())
        return pair

    engine.set_batch_fn(cut)
    data = iter([(torch.ones(1, 2), torch.ones(1))] * 8)
    for _ in range(4):
        engine.train_batch(data)
    assert lengths == [2, 2, 4, 4, 4, 4, 6, 6]


def test_the_model_is_told_which_share_of_layers_is_kept(tmp_path):
    engine = start(progressive_layer_drop={"enabled": True, "theta": 0.5, "gamma": 0.1})
    run(engine, 3)
    assert engine.get_pld_theta() == 0.5 * math.exp(-0.2) + 0.5
    shares = [kwargs["pld_theta"] for kwargs in engine.module.heard[::2]]
    assert shares == [1.0, 1.0, 0.5 * math.exp(-0.1) + 0.5]
    assert all(kwargs["progressive_layer_drop"] is True for kwargs in engine.module.heard)
    engine.eval()
    engine(torch.ones(1, 2))
    assert engine.module.heard[-1] == {}


class Blocks(nn.Module):
    """Its loss is a quadratic form of each block's weight, and linear in the last one's."""

    def __init__(self, forms):
        super().__init__()
        self.inner = nn.Module()
        self.inner.layer = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(len(forms) + 1))
        self.forms = forms

    def forward(self):
        weights = [layer.weight[0] for layer in self.inner.layer]
        terms = [w @ a @ w / 2 for w, a in zip(weights, self.forms, strict=False)]
        return sum(terms) + weights[-1].sum()


def test_eigenvalues_are_those_of_the_blocks_hessians():
    bases = [torch.linalg.qr(torch.randn(3, 3))[0] for _ in range(2)]
    spectra = [torch.tensor([1.0, 2.0, 8.0]), torch.tensor([0.5, -4.0, 1.0])]
    module = Blocks([q @ torch.diag(s) @ q.T for q, s in zip(bases, spectra, strict=True)])
    with pytest.warns(UserWarning, match="create_graph=True"):
        module().backward(create_graph=True)
    found = Eigenvalue(tol=1e-6, layer_name="inner.layer").compute_eigenvalue(module)
    layers = module.inner.layer
    shares = [found[id(layer.weight)] for layer in layers]
    assert [number for _, number in shares] == [0, 1, 2]
    # power iteration ends where it changes by 1e-6: the eigenvalue is that exact or better
    assert [share for share, _ in shares] == pytest.approx([1.0, 0.5, 1.0], rel=1e-4)
    assert _eigenvalue_summary_events({1: (0.5, 0), 2: (1.0, 1)}, 7) == [
        ("Train/Eigenvalues/ModelBlockParam_0", 0.5, 7),
        ("Train/Eigenvalues/ModelBlockParam_1", 1.0, 7),
    ]
    for param in module.parameters():
        param.grad = None  # a graph of its own would keep it alive


@pytest.mark.parametrize("options", [{}, {"layer_name": "x", "layer_num": -1}])
def test_eigenvalues_of_no_blocks(options):
    with pytest.raises(ValueError, match="blocks of a list"):
        Eigenvalue(**options)
