# SPDX-License-Identifier: Apache-2.0
"""A pipeline trains as the same layers do in one process."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

WIDTH, CLASSES, STEPS = 8, 5, 4


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, WIDTH) * 0.5)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)


def logits(embed, hidden):
    return hidden @ embed.weight.t()


def loss_fn(outputs, labels):
    return nn.functional.cross_entropy(outputs.flatten(0, -2).float(), labels.flatten())


def specs(tied, in_place=False):
    if tied:
        first = TiedLayerSpec("embed", Embed)
        last = TiedLayerSpec("embed", Embed, forward_fn=logits)
    else:
        first, last = LayerSpec(Embed), LayerSpec(nn.Linear, WIDTH, CLASSES)
    squash = torch.tanh_ if in_place else torch.tanh  # the second stage's first layer
    return [first, LayerSpec(nn.Linear, WIDTH, WIDTH), squash, nn.Identity(), last]


def batches(rank, ranks, count):
    """Micro-batches of one data-parallel rank of several: (inputs, labels)."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(0, CLASSES, (2, 4), generator=generator) for _ in range(count * ranks)]
    return [(ids, (ids + 1) % CLASSES) for ids in drawn[rank::ranks]]


def whole(tied):
    """The same layers, built with the same seeds, as one model."""
    layers = []
    shared = None
    for number, spec in enumerate(specs(tied)):
        torch.manual_seed(1234 + number)
        if isinstance(spec, TiedLayerSpec):
            shared = shared or spec.build()
            layers.append((shared, spec.forward_fn))
        else:
            layers.append((spec.build() if isinstance(spec, LayerSpec) else spec, None))
    return layers


def reference(tied, ranks, micro, clip, bf16):
    layers = whole(tied)
    modules = nn.ModuleList(
        dict.fromkeys(module for module, _ in layers if isinstance(module, nn.Module))
    )
    weights = [p for p in modules.parameters()]
    masters = [p.detach().clone().float() for p in weights]
    if bf16:
        modules.to(torch.bfloat16)
        masters = [p.detach().clone().float() for p in modules.parameters()]
        weights = list(modules.parameters())
    optimizer = torch.optim.AdamW(masters, lr=1e-2)
    data = [iter(batches(rank, ranks, STEPS * micro)) for rank in range(ranks)]
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for stream in data:
            for _ in range(micro):
                value, labels = next(stream)
                for module, forward in layers:
                    value = module(value) if forward is None else forward(module, value)
                loss = loss_fn(value, labels)
                (loss / (micro * ranks)).backward()
                total += loss.item() / (micro * ranks)
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        if clip:
            torch.nn.utils.clip_grad_norm_(masters, clip)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        losses.append(total)
    return losses


def build(
    tied,
    stages,
    micro,
    stage,
    clip,
    bf16,
    freeze=False,
    use_reentrant=None,
    in_place=False,
    **options,
):
    last = [LayerSpec(nn.Linear, CLASSES, CLASSES)] if freeze else []
    net = PipelineModule(
        specs(tied, in_place) + last,
        num_stages=stages,
        loss_fn=loss_fn,
        seed_layers=True,
        partition_method="uniform",
        **options,
    )
    for name, param in net.named_parameters():
        param.requires_grad_(not (freeze and name.startswith("tied")))
    # Seeding is for the layers' weights; running layers draw nothing.
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "pipeline": {"use_reentrant": use_reentrant},
        "steps_per_print": 1000,
    }
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=[p for p in net.parameters() if p.requires_grad], config=config
    )
    return engine


def train(rank, tied, stages, micro, stage, clip, bf16, options):
    engine = build(tied, stages, micro, stage, clip, bf16, **options)
    data = iter(batches(engine.mesh.data.rank, engine.dp_world_size, STEPS * micro))
    losses = [engine.train_batch(data).item() for _ in range(STEPS)]
    norm = engine.get_global_grad_norm()
    kind = deepspeed.checkpointing.checkpoint
    if options.get("use_reentrant") is False:
        kind = deepspeed.checkpointing.non_reentrant_checkpoint
    assert engine.module.activation_checkpoint_func is kind
    engine.destroy()
    return losses, None if norm is None else float(norm), engine.global_steps


CASES = [
    # tied, micro-batches, ZeRO stage, clip, bf16, options
    (False, 1, 0, 0.0, False, {"in_place": True}),
    (True, 3, 0, 0.1, False, {}),
    (True, 4, 1, 0.1, False, {"activation_checkpoint_interval": 1}),
    (False, 2, 1, 0.1, False, {"dynamic_shape": True}),
    (False, 2, 0, 0.0, False, {"activation_checkpoint_interval": 1, "use_reentrant": False}),
    (True, 3, 1, 0.0, True, {}),
    (True, 2, 0, 0.1, True, {}),
]


@pytest.mark.parametrize("tied, micro, stage, clip, bf16, options", CASES)
def test_two_stages_train_like_one_process(ranks2, tied, micro, stage, clip, bf16, options):
    expected = reference(tied, 1, micro, clip, bf16)
    # fp32: sums in another order; bf16: gradients of tied weights are added up in bf16 after each stage rounded its own.
    room = 2e-2 if bf16 else 1e-5
    for losses, _, steps in ranks2.run(train, tied, 2, micro, stage, clip, bf16, options):
        assert losses == pytest.approx(expected, rel=room)
        assert steps == STEPS


@pytest.mark.parametrize("stage", [0, 1])
def test_two_stages_on_two_data_parallel_ranks_each(ranks4, stage):
    expected = reference(True, 2, 3, 0.1, False)
    results = ranks4.run(train, True, 2, 3, stage, 0.1, False, {})
    assert len({norm for _, norm, _ in results}) == 1
    for losses, *_ in results:
        assert losses == pytest.approx(expected, rel=1e-5)


def evaluate(rank):
    engine = build(False, 2, 2, 0, 0.0, False)
    data = batches(0, 1, 2)
    loss = engine.eval_batch(iter(data))
    both, outputs = engine.eval_batch(iter(data), return_logits=True)
    alone = engine.eval_batch(iter(data), compute_loss=False)
    third = engine.eval_batch(iter(batches(0, 1, 3)), num_micro_batches=3, reduce_output="sum")
    trained = engine.train_batch(iter(data))  # evaluation left nothing behind
    for call in (engine.forward, engine.backward, engine.step):
        with pytest.raises(PipelineError, match="train_batch"):
            call(None)
    group = engine.data_parallel_group
    assert (group.rank(), group.size()) == (0, 1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="eval_batch"):
        engine.train_batch(iter(data))
    return loss.item(), both.item(), outputs, alone, third.item(), trained.item()


def test_evaluation_gives_losses_and_outputs(ranks2):
    first, last = ranks2.run(evaluate)
    layers = whole(False)
    values = []
    for ids, labels in batches(0, 1, 3):
        value = ids
        for module, _ in layers:
            value = module(value)
        values.append((value, loss_fn(value, labels).item()))
    mean = (values[0][1] + values[1][1]) / 2
    for result in (first, last):
        assert (result[0], result[1], result[5]) == pytest.approx((mean, mean, mean), rel=1e-6)
        assert result[4] == pytest.approx(sum(loss for _, loss in values), rel=1e-6)
    assert first[2] is None and first[3] is None
    wanted = torch.cat([value for value, _ in values[:2]])
    torch.testing.assert_close(last[2], wanted)
    torch.testing.assert_close(last[3], wanted)


def resume(rank, folder, stage):
    engine = build(True, 2, 2, stage, 0.0, False)
    data = batches(0, 1, 8)
    for step in range(2):
        engine.train_batch(iter(data[2 * step : 2 * step + 2]))
    engine.save_checkpoint(folder)
    expected = [engine.train_batch(iter(data[at : at + 2])).item() for at in (4, 6)]
    other = build(True, 2, 2, stage, 0.0, False)
    for param in other.module.parameters():
        param.data.add_(1.0)
    path, _ = other.load_checkpoint(folder)
    assert path is not None and other.global_steps == 2
    return expected, [other.train_batch(iter(data[at : at + 2])).item() for at in (4, 6)]


@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_is_saved_a_file_a_layer_and_resumes(ranks2, tmp_path, stage):
    for expected, got in ranks2.run(resume, str(tmp_path), stage):
        assert got == expected
    names = {path.name for path in (tmp_path / "global_step2").iterdir()}
    layers = {f"layer_{number:02d}-model_states.pt" for number in (0, 1, 3, 4)}
    assert layers | {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"} <= names


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, hidden):
        return self.norm(hidden)


def normed(rank, folder, stages):
    """Train, save and go on; or take over what another number of stages saved, and go on."""
    tied = [TiedLayerSpec("square", nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(2)]
    layers = [tied[0], LayerSpec(Norm), torch.tanh, LayerSpec(nn.Linear, WIDTH, WIDTH)]
    net = PipelineModule(
        [*layers, LayerSpec(Norm), tied[1]],
        num_stages=stages,
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
        base_seed=1234 + stages,
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "checkpoint": {"load_universal": stages != 2},
    }
    engine, *_ = deepspeed.initialize(model=net, config=config)
    generator = torch.Generator().manual_seed(1)
    data = [(x, x.flip(1)) for x in torch.randn(10, 4, WIDTH, generator=generator)]
    if stages == 2:
        for at in (0, 2):
            engine.train_batch(iter(data[at : at + 2]))
        engine.save_checkpoint(folder, tag="step")
    else:
        engine.load_checkpoint(folder, tag="step_universal")
    return [engine.train_batch(iter(data[at : at + 2])).item() for at in (4, 6, 8)]


def test_a_pipeline_goes_on_with_another_number_of_stages(ranks2, ranks3, tmp_path):
    expected = ranks2.run(normed, str(tmp_path), 2)[0]
    convert(tmp_path / "step", tmp_path / "step_universal")
    for got in ranks3.run(normed, str(tmp_path), 3):
        assert got == expected


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        torch.linspace(0, 1, 3).tolist()  # cannot be built without memory

    def forward(self, hidden):
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return (self.linear(hidden),)


def odd_layers(rank, interval, folder):
    layers = [
        LayerSpec(Packs),
        LayerSpec(Packs),
        lambda packed: packed[0],
        partial(torch.flatten, start_dim=1),
    ]
    net = PipelineModule(
        layers,
        num_stages=2,
        loss_fn=lambda out, labels: (out - labels).square().mean(),
        activation_checkpoint_interval=interval,
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    engine, *_ = deepspeed.initialize(model=net, config=config)
    x = torch.ones(2, 2, 4)
    data = iter([(x, x.flatten(1))] * 100)
    losses = [engine.train_batch(data).item()]
    for samples in (6, 16):  # of 4 micro-batches to 3, and to 8
        engine.set_train_batch_size(samples)
        losses.append(engine.train_batch(data).item())
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    return losses, engine.global_steps


@pytest.mark.parametrize("interval", [0, 1])
def test_packed_values_functions_and_other_batch_sizes(ranks2, tmp_path, interval):
    for losses, steps in ranks2.run(odd_layers, interval, str(tmp_path)):
        assert steps == 3 and losses[0] > losses[1] > losses[2]


def frozen_tie(rank, stage):
    engine = build(True, 2, 2, stage, 0.0, False, freeze=True)
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.train_batch(iter(batches(0, 1, 2)))
    return {n: torch.equal(p, before[n]) for n, p in engine.module.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1])
def test_frozen_tied_weights_stay(ranks2, stage):
    for same in ranks2.run(frozen_tie, stage):
        assert same["tied_modules.embed.weight"] and not all(same.values())


def cut(rank):
    layers = [LayerSpec(nn.Linear, 4, 4), torch.relu, LayerSpec(nn.Linear, 4, 40), nn.Tanh()]
    by_params = PipelineModule(layers, num_stages=2).parts
    by_type = PipelineModule(layers, num_stages=2, partition_method="type:linear").parts
    topology = PipeDataParallelTopology(2, 1)
    net = PipelineModule(layers, topology=topology, partition_method="uniform")
    assert net.stage_owner(3) == 1 and net.num_pipeline_stages() == 2
    assert net.mpu().get_pipe_parallel_rank() == rank
    with pytest.raises(RuntimeError, match="num_stages or topology"):
        PipelineModule(layers)
    with pytest.raises(RuntimeError, match="2 ranks, num_stages=3"):
        PipelineModule(layers, num_stages=3)
    with pytest.raises(RuntimeError, match="no layer matches"):
        PipelineModule(layers, num_stages=2, partition_method="type:conv")
    with pytest.raises(NotImplementedError, match="'best'"):
        PipelineModule(layers, num_stages=2, partition_method="best")
    with pytest.raises(RuntimeError, match="only supports torch.nn.Module"):
        LayerSpec(len)
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}}
    with pytest.raises(AssertionError, match="ZeRO stage 2"):
        deepspeed.initialize(model=net, config={**config, "zero_optimization": {"stage": 2}})
    autocast = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    with pytest.raises(AssertionError, match="torch_autocast in fp16"):
        deepspeed.initialize(model=net, config={**config, **autocast})
    with pytest.raises(AssertionError, match="mpu must be None"):
        deepspeed.initialize(model=copy.copy(net), config=config, mpu=net.mpu())
    return by_params, by_type, net.parts


def test_layers_are_cut_into_stages(ranks2):
    for by_params, by_type, uniform in ranks2.run(cut):
        assert by_params in ([0, 1, 4], [0, 2, 4])
        assert by_type in ([0, 1, 4], [0, 2, 4])
        assert uniform == [0, 2, 4]
