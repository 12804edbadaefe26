# SPDX-License-Identifier: Apache-2.0
"""A model prepared, trained and cleaned: layers, schedules, engines, against plain masks and plain layers."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepspeed
from deepspeed.compression import (
    compression_scheduler,
    convert_conv1d_to_linear,
    init_compression,
    redundancy_clean,
)
from deepspeed.compression.basic_layer import (
    BNLayer_Compress,
    Conv2dLayer_Compress,
    Embedding_Compress,
    LinearLayer_Compress,
)
from deepspeed.compression.compress import student_initialization
from deepspeed.compression.config import get_compression_config
from deepspeed.compression.utils import AsymQuantizer, SymQuantizer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self = Attention()
        self.output = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x):
        def heads(y):
            return y.unflatten(-1, (-1, 2)).transpose(-2, -3)

        q, k, v = (heads(layer(x)) for layer in self.self.children())
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.output(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.layer = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(8, 12)

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layer:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return self.conv2(torch.relu(self.bn1(self.conv1(x)))).square().mean()


IDS = torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(3))


def group(modules, related=None, **params):
    return {"params": params, "modules": modules, "related_modules": related}


def technique(groups, **shared):
    shared = {"enabled": True, "schedule_offset": 0, **shared}
    named = {str(number): entry for number, entry in enumerate(groups)}
    return {"shared_parameters": shared, "different_groups": named}


def config(stage=0, dtype=None, **techniques):
    return {
        "train_batch_size": 2,
        "steps_per_print": 10**6,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        **({dtype: {"enabled": True}} if dtype else {}),
        "compression_training": techniques,
    }


BITS = {"start_bits": 4, "target_bits": 4}
ROWS = technique([group(["up"], [["down"]], dense_ratio=0.5)], method="topk")
HEADS = technique(
    [group(["output"], [["self.query", "self.key", "self.value"]], dense_ratio=0.5)],
    method="topk",
    num_heads=4,
)


def in_forward(*groups, **shared):
    return technique(groups, quantize_weight_in_forward=True, **shared)


def begin(model, config):
    """Switch a model's techniques on, as an engine would at its first step."""
    scheduler = compression_scheduler(model, get_compression_config(config))
    scheduler.step(step_zero_check=True)
    return scheduler


def prepared(config, make=Model, seed=0):
    torch.manual_seed(seed)
    model = init_compression(make(), config)
    begin(model, config)
    return model


def test_only_what_is_named_changes_its_class_and_keeps_its_weights(tmp_path):
    model = Model()
    weights = {name: param for name, param in model.named_parameters()}
    asked = config(weight_quantization=in_forward(group(["query$", "words"], **BITS)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asked), encoding="utf-8")
    assert init_compression(model, str(path)) is model
    assert isinstance(model.layer[1].self.query, LinearLayer_Compress)
    assert isinstance(model.words, Embedding_Compress) and type(model.head) is nn.Linear
    assert all(param is weights[name] for name, param in model.named_parameters())
    assert "weight_quantization=4" in repr(model.words)


def test_quantized_layers_compute_with_rounded_weights_and_inputs():
    asked = config(
        weight_quantization=in_forward(
            group(["*"], start_bits=8, target_bits=4),
            quantize_groups=2,
            quantization_type="asymmetric",
        ),
        activation_quantization=technique([group(["up"], bits=8)]),
    )
    model = prepared(asked)
    layer, words, x = model.layer[0].up, model.words, torch.randn(2, 5, 8)
    weight = AsymQuantizer.apply(layer.weight, 4, None, None, 2)
    rounded = SymQuantizer.apply(x, 8, None, None, 10)  # a scale for each of ten tokens
    torch.testing.assert_close(layer(x), F.linear(rounded, weight, layer.bias))
    rows = AsymQuantizer.apply(words.weight, 4, None, None, 12)  # a scale for each word
    torch.testing.assert_close(words(IDS), F.embedding(IDS, rows))
    expected = model(IDS)
    cleaned = redundancy_clean(model, asked)
    assert torch.equal(cleaned.layer[0].up.weight, weight)
    torch.testing.assert_close(cleaned(IDS), expected)


@pytest.mark.parametrize("method", ["l1", "topk"])
def test_pruned_weights_and_rows_are_zero_and_stay_so_when_cleaned(method):
    asked = config(
        sparse_pruning=technique([group(["down"], dense_ratio=0.4)], method=method),
        row_pruning=technique([group(["up"], dense_ratio=0.4)], method=method),
    )
    model = prepared(asked)
    up, down, x = model.layer[0].up, model.layer[0].down, torch.randn(3, 8)
    rows, single = up.get_mask("row"), down.get_mask("sparse")
    assert rows.sum() == 4 and single.sum() == 32
    if method == "l1":
        order = up.weight.abs().sum(1).argsort(descending=True)
        assert set(rows.flatten().nonzero().flatten().tolist()) == set(order[:4].tolist())
        assert down.weight.abs()[single.bool()].min() >= down.weight.abs()[~single.bool()].max()
    masked = F.linear(x, up.weight * rows, up.bias * rows.flatten())
    torch.testing.assert_close(up(x), masked)
    expected = model(IDS)
    redundancy_clean(model, asked)
    assert up.weight.shape == (10, 8) and up.weight.count_nonzero() == 4 * 8
    assert down.weight.count_nonzero() == 32
    torch.testing.assert_close(model(IDS), expected)
    assert not any("scores" in name or "mask" in name for name in model.state_dict())


def test_rows_and_heads_go_with_what_reads_and_makes_them():
    asked = config(
        weight_quantization=in_forward(group(["self", "up", "down"], **BITS), quantize_groups=2),
        row_pruning=ROWS,
        head_pruning=HEADS,
    )
    model = prepared(asked)
    expected = model(IDS)
    before = copy.deepcopy(model)
    assert redundancy_clean(model, asked) is model
    for layer, old in zip(model.layer, before.layer, strict=True):
        assert layer.up.weight.shape == (5, 8) and layer.down.weight.shape == (8, 5)
        assert layer.self.value.weight.shape == (4, 8) and layer.output.weight.shape == (8, 4)
        assert (layer.output.in_features, layer.self.key.out_features) == (4, 4)
        kept = old.up.get_mask("row").flatten().bool()
        assert torch.equal(layer.up.bias, old.up.bias[kept])
    torch.testing.assert_close(model(IDS), expected)


def test_channels_go_with_their_norm_and_the_next_convolution():
    asked = config(
        channel_pruning=technique(
            [group(["conv1"], [["conv2", "bn1", "absent"]], dense_ratio=0.5)], method="l1"
        )
    )
    model = prepared(asked, Images)
    assert isinstance(model.conv1, Conv2dLayer_Compress) and isinstance(model.bn1, BNLayer_Compress)
    kept = model.conv1.get_mask("channel").flatten().bool()
    order = model.conv1.weight.abs().sum((1, 2, 3)).argsort(descending=True)
    assert set(kept.nonzero().flatten().tolist()) == set(order[:3].tolist())
    model.bn1.running_mean.copy_(torch.arange(6.0))
    redundancy_clean(model, asked)
    assert model.conv1.weight.shape[:2] == (3, 3) and model.conv2.weight.shape[:2] == (4, 3)
    assert torch.equal(model.bn1.running_mean, torch.arange(6.0)[kept])
    assert model.eval()(torch.randn(2, 3, 8, 8)).isfinite()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_trains_as_masks_and_rounding_in_plain_torch_do(stage):
    asked = config(
        stage,
        weight_quantization=in_forward(group(["up"], **BITS), schedule_offset=1),
        row_pruning=technique([group(["up"], dense_ratio=0.5)], method="topk", schedule_offset=2),
    )
    torch.manual_seed(0)
    plain = Model(1)
    model = init_compression(copy.deepcopy(plain), asked)
    scores = model.layer[0].up.row_mask_scores.detach().clone().requires_grad_()
    weight, bias = plain.layer[0].up.weight, plain.layer[0].up.bias
    engine, *_ = deepspeed.initialize(model=model, config=asked)
    optimizer = torch.optim.AdamW([*plain.parameters(), scores], lr=1e-2, weight_decay=0)
    for step in range(4):
        loss = engine(IDS)
        engine.backward(loss)
        engine.step()
        rounded = weight + (SymQuantizer.apply(weight, 4) - weight).detach() * (step >= 1)
        mask = torch.zeros(10, 1)
        mask[scores.flatten().argsort(descending=True)[:5]] = 1
        mask = mask + (scores - scores.detach()) if step >= 2 else torch.ones(10, 1)
        own = {"layer.0.up.weight": rounded * mask, "layer.0.up.bias": bias * mask.flatten()}
        expected = torch.func.functional_call(plain, own, (IDS,))
        optimizer.zero_grad()
        expected.backward()
        if (
            scores.grad is None
        ):  # the engine's Adam counts the steps of a group, with gradients or without
            scores.grad = torch.zeros_like(scores)
        optimizer.step()
        # the same arithmetic in another order; a rounded weight may move by a level where it lies between two
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert engine.compression_scheduler.training_steps == 4
    if stage == 3:
        with pytest.raises(ValueError, match="needs whole weights"):
            redundancy_clean(engine, asked)
    engine.destroy()


@pytest.mark.parametrize(("stage", "offset"), [(0, 0), (1, 2), (2, 0)])
def test_weights_of_16_bits_are_rounded_in_the_step_and_go_on_after_a_checkpoint(
    stage, offset, tmp_path
):
    asked = config(
        stage,
        "bf16",
        weight_quantization=technique(
            [group(["up"], start_bits=8, target_bits=4, quantization_period=1)],
            schedule_offset=offset,
        ),
        row_pruning={
            **ROWS,
            "shared_parameters": {"enabled": True, "schedule_offset": 3, "method": "topk"},
        },
    )

    def make():
        torch.manual_seed(0)
        model = init_compression(Model(1), asked)
        return deepspeed.initialize(model=model, config=asked)[0]

    def run(engine, steps):
        losses = []
        for _ in range(steps):
            loss = engine(IDS)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, engine.module.layer[0].up.weight.detach().clone()

    engine = make()
    _, weight = run(engine, 4)
    calls = 4 - offset + (offset == 0)
    bits = 8 - sum(calls >= period for period in (1, 2, 4, 8))
    assert engine.module.layer[0].up.weight.start_bits == bits and len(weight.unique()) <= 2**bits
    engine.save_checkpoint(tmp_path, "t")
    later = run(engine, 3)
    other = make()
    for resumed in (other, engine):
        resumed.load_checkpoint(tmp_path, "t")
        assert torch.equal(resumed.module.layer[0].up.weight, weight)
        losses, final = run(resumed, 3)
        assert losses == later[0] and torch.equal(final, later[1])
    other.destroy()


def test_rounding_in_the_step_needs_masters_of_its_own():
    quantized = technique([group(["up"], **BITS)])
    for asked, why in (
        (config(weight_quantization=quantized), "only supported for FP16"),
        (config(3, "bf16", weight_quantization=quantized), "ZeRO stage 3"),
    ):
        model = init_compression(Model(1), asked)
        with pytest.raises(AssertionError, match=why):
            deepspeed.initialize(model=model, config=asked)


def test_a_student_takes_the_teachers_layers():
    reduction = {
        "enabled": True,
        "keep_number_layer": 2,
        "module_name_prefix": "layer",
        "teacher_layer": [1, 3],
        "other_module_name": ["words"],
    }
    teacher, student = Model(4), Model(2)
    head = student.head.weight.detach().clone()
    asked = config(layer_reduction=reduction)
    with pytest.raises(AssertionError, match="Teacher model is required"):
        init_compression(student, asked)
    init_compression(student, asked, teacher_model=teacher)
    for own, taken in ((0, 1), (1, 3)):
        for a, b in zip(
            student.layer[own].parameters(), teacher.layer[taken].parameters(), strict=True
        ):
            assert torch.equal(a, b) and a is not b
    assert torch.equal(student.words.weight, teacher.words.weight)
    assert torch.equal(student.head.weight, head)
    teacher.layer[3].up = nn.Linear(8, 11)
    with pytest.raises(ValueError, match=r"layer\.1\.up\.weight"):
        student_initialization(student, teacher, asked)


def test_blocks_go_little_by_little_those_that_matter_least_first():
    asked = config(
        sparse_pruning={
            "shared_parameters": {
                "enabled": True,
                "method": "snip_momentum",
                "schedule_offset": 2,
                "schedule_offset_end": 6,
                "schedule_offset_stride": 2,
                "block_pattern": "4x1",
                "dense_ratio": 0.25,
                "excluded_modules": ["head", "self"],
            }
        }
    )
    torch.manual_seed(0)
    model = init_compression(Model(1), asked)
    layers = {"output": model.layer[0].output, "down": model.layer[0].down}
    assert type(model.head) is nn.Linear and model.layer[0].up.weight.shape[0] % 4
    assert type(model.layer[0].up) is nn.Linear  # blocks do not fill it: left alone, with a warning
    engine, *_ = deepspeed.initialize(model=model, config=asked)
    scores, shares = {name: 0.0 for name in layers}, []
    former = {name: torch.ones_like(layer.weight) for name, layer in layers.items()}
    for step in range(1, 8):
        loss = engine(IDS)
        loss.backward()
        for name, layer in layers.items():
            scores[name] = 0.9 * scores[name] + (layer.weight * layer.weight.grad).abs().detach()
        engine.step()
        masks = {name: layer.sparse_pruning_mask.clone() for name, layer in layers.items()}
        gone = sum(int((mask == 0).sum()) for mask in masks.values())
        shares.append(gone / sum(mask.numel() for mask in masks.values()))
        if step == 4:  # blocks of the smallest mean scores, in both layers together
            of_blocks = {
                name: (score.unflatten(0, (-1, 4)).mean(1), masks[name][::4])
                for name, score in scores.items()
            }
            lost = torch.cat([score[mask == 0] for score, mask in of_blocks.values()])
            kept = torch.cat([score[mask == 1] for score, mask in of_blocks.values()])
            assert lost.max() <= kept.min()
        for name, mask in masks.items():
            assert (mask <= former[name]).all()
            assert torch.equal(mask, mask[::4].repeat_interleave(4, 0))
        former = masks
    # 0.75 * (1 - (1 - progress)^3) at steps 2, 4 and 6, to whole blocks of 36
    expected = [0, 0, 0, 0.75 * 0.875, 0.75 * 0.875, 0.75, 0.75]
    assert shares == pytest.approx(expected, abs=0.5 / 36)
    engine.destroy()
    redundancy_clean(model, asked)
    assert model.layer[0].output.weight.count_nonzero() == masks["output"].count_nonzero()


def test_layers_like_gpt2s_become_linear():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x @ self.weight + self.bias

    layer, x = Conv1D(), torch.randn(2, 5)
    model = nn.ModuleList([layer, nn.Sequential(Conv1D()), layer])
    expected = layer(x)
    assert convert_conv1d_to_linear(model, Conv1D) is model
    assert type(model[0]) is nn.Linear and type(model[1][0]) is nn.Linear and model[2] is model[0]
    torch.testing.assert_close(model[0](x), expected)


def test_what_the_forward_pass_does_not_use_is_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    asked = in_forward(group(["up"], start_bits=8, target_bits=4), rounding="stochastic")
    init_compression(Model(1), config(weight_quantization=asked))
    assert "rounding, start_bits is of quantization in the optimizer's step" in caplog.text
    caplog.clear()
    init_compression(Model(1), config(weight_quantization=in_forward(group(["up"], **BITS))))
    assert caplog.text == ""


def test_what_does_not_fit_is_refused_by_name():
    twice = in_forward(group(["query"], **BITS), group(["self"], **BITS))
    with pytest.raises(ValueError, match="already added"):
        init_compression(Model(), config(weight_quantization=twice))
    with pytest.raises(ValueError, match="not as many"):
        rows = technique([group(["up"], [["head"]], dense_ratio=0.5)], method="topk")
        init_compression(Model(), config(row_pruning=rows))
    with pytest.raises(NotImplementedError, match="head_pruning"):
        asked = {**HEADS, "shared_parameters": {**HEADS["shared_parameters"], "method": "l1"}}
        init_compression(Model(), config(head_pruning=asked))
    with pytest.raises(AssertionError, match="Only symmetric"):
        one = in_forward(group(["up"], start_bits=1, target_bits=1), quantization_type="asymmetric")
        init_compression(Model(), config(weight_quantization=one))
    with pytest.raises(ValueError, match="unusable dense_ratio"):
        none = technique([group(["up"], dense_ratio=0.0)])
        init_compression(Model(), config(sparse_pruning=none))
    with pytest.raises(ValueError, match="existing deepspeed config"):
        init_compression(Model(), 5)
    with pytest.raises(ValueError, match="was not prepared"):
        redundancy_clean(Model(), config(row_pruning=ROWS))
