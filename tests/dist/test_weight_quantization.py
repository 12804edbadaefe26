# SPDX-License-Identifier: Apache-2.0
"""Quantized weights of a sharded model: what the slices hold, what is computed, and what cannot be."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization
from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer
from deepspeed.utils.errors import DeepSpeedConfigError

GROUPS = {"num_bits": 4, "group_size": 8, "group_dim": 1, "symmetric": False}
EIGHT = {"num_bits": 8, "group_size": 4, "group_dim": 0, "symmetric": True}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.embed = torch.nn.Embedding(20, 24)
        self.up = torch.nn.Linear(24, 40)
        self.down = torch.nn.Linear(40, 12, bias=False)
        self.norm = torch.nn.LayerNorm(12)

    def forward(self, ids):
        return self.norm(self.down(torch.tanh(self.up(self.embed(ids)))))


IDS = torch.tensor([[0, 3, 19], [7, 7, 1]])


def config_of(section, stage=3, dtype=torch.float32, folder=None, **extra):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    if folder is not None:
        zero["offload_param"] = {"device": "nvme", "nvme_path": folder}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "weight_quantization": section,
        **extra,
    }


def there_and_back(values, settings):
    return DeQuantizer(settings, values.dtype).dequantize(*Quantizer(settings).quantize(values))


def by_hand(dtype, **settings):
    """Outputs of the plain model with weights that went there and back."""
    torch.set_num_threads(1)  # as in the ranks: products are cut, and so rounded, by threads
    net = Net().to(dtype)
    for name, each in settings.items():
        weight = net.get_submodule(name).weight
        weight.data = there_and_back(weight.data, each)
    with torch.no_grad():
        return net(IDS), [p.detach() for p in net.parameters()]


def build(way, config):
    """The engine of a quantized model, made in one of the ways that there are."""
    if way == "init":
        with deepspeed.zero.Init(config_dict_or_path=config):
            net = Net()
        # As a program that loads weights does; what Init made of them before must not count.
        whole = Net().state_dict()
        for name, param in net.named_parameters():
            with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    param.data.copy_(whole[name])
    elif way == "existing":
        net = Net()
    elif way == "replaced":
        net = Net()
        net.to(torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
        _init_group_wise_weight_quantization(net, config)
    else:
        plain = {"train_batch_size": 2, "bf16": config["bf16"]}
        with deepspeed.zero.Init(config_dict_or_path=plain, remote_device="cpu"):
            net = Net()
        whole = Net().state_dict()
        for name, param in net.named_parameters():
            with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
                param.data.copy_(whole[name])
        if way == "replaced after Init":
            _init_group_wise_weight_quantization(net, config)
    return deepspeed.initialize(model=net, config=config)[0]


def outputs(rank, way, section, dtype, folder):
    engine = build(way, config_of(section, dtype=dtype, folder=folder))
    engine.eval()
    with torch.no_grad():
        got = [engine(IDS) for _ in range(3)]  # the record is made, then followed
    held = {
        name: (p.ds_tensor.dtype, p.partition_numel(), p.numel())
        for name, p in engine.module.named_parameters()
    }
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        whole = [p.detach().clone() for p in engine.module.parameters()]
    return got, held, whole, type(engine.module.up).__name__


INITIAL = {"quantized_initialization": GROUPS}
BY_NAME = {"post_init_quant": {"up": GROUPS, "down": GROUPS, "embed": GROUPS}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("way", "section"),
    [
        ("init", INITIAL),
        ("existing", INITIAL),
        ("existing", BY_NAME),
        ("init and then", BY_NAME),
        ("replaced", BY_NAME),
        ("replaced after Init", BY_NAME),
    ],
)
def test_slices_hold_the_codes_and_the_model_computes_with_their_values(
    way, section, dtype, ranks2
):
    want, params = by_hand(dtype, embed=GROUPS, up=GROUPS, down=GROUPS)
    ranks = ranks2.run(outputs, way, section, dtype, None)
    for got, held, whole, kind in ranks:
        assert all(torch.equal(each, want) for each in got)
        for name, numel in (("embed", 480), ("up", 960), ("down", 480)):
            # half a byte a value; a scale and a minimum for every 8 of them; cut in two
            assert held[f"{name}.weight"] == (
                torch.uint8,
                (numel // 2 + numel // 8 * 2 * dtype.itemsize) // 2,
                0,
            )
        assert held["up.bias"] == (dtype, 20, 0)
        assert kind == ("QuantizedLinear" if "replaced" in way else "Linear")
        if way != "replaced":  # there, the parameter is the codes
            assert all(torch.equal(a, b) for a, b in zip(whole, params, strict=True))


@pytest.mark.parametrize("way", ["existing", "init and then"])
def test_slices_in_files_hold_the_codes_too(way, ranks2, tmp_path):
    want, _ = by_hand(torch.float32, up=GROUPS, down=EIGHT)
    section = {"post_init_quant": {"up": GROUPS, "down": EIGHT}}
    for got, held, _, _ in ranks2.run(outputs, way, section, torch.float32, str(tmp_path)):
        assert all(torch.equal(each, want) for each in got)
        assert held["up.weight"][1] == (480 + 120 * 8) // 2
        assert held["down.weight"][1] == (480 + 120 * 4) // 2


def edit(rank):
    engine = build("existing", config_of(INITIAL))
    weight = engine.module.up.weight
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=1):
        if rank == 1:
            weight.data.copy_(torch.linspace(-1, 1, 960).view(40, 24))
    with deepspeed.zero.GatheredParameters(weight):
        return weight.detach().clone()


def test_edits_are_quantized_again(ranks2):
    want = there_and_back(torch.linspace(-1, 1, 960).view(40, 24), GROUPS)
    for got in ranks2.run(edit):
        assert torch.equal(got, want)


def train_adapter(rank):
    net = torch.nn.Sequential(Net(), torch.nn.Linear(12, 1))
    net[0].requires_grad_(False)
    config = config_of(
        {"post_init_quant": {"0.up": GROUPS, "0.down": GROUPS}},
        optimizer={"type": "SGD", "params": {"lr": 0.1}},
        zero_allow_untested_optimizer=True,
    )
    engine = deepspeed.initialize(model=net, config=config)[0]
    losses = []
    for _ in range(3):
        loss = engine((IDS + rank) % 20).square().mean()
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


def test_what_is_trained_on_top_of_quantized_weights_learns(ranks2):
    for losses in ranks2.run(train_adapter):
        assert losses[2] < losses[1] < losses[0]


def refused(rank):
    told = []
    for section, change in (
        (INITIAL, {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}),
        ({"quantized_initialization": {**GROUPS, "group_size": 7}}, {}),
        ({"quantized_initialization": {**GROUPS, "num_bits": 5}}, {}),
        (INITIAL, {"stage": 0}),
    ):
        stage = change.pop("stage", 3)
        try:
            deepspeed.initialize(model=Net(), config=config_of(section, stage, **change))
        except (ValueError, DeepSpeedConfigError) as error:
            told.append(str(error))
    return told


def test_what_cannot_be_is_refused_with_its_reason(ranks2):
    for told in ranks2.run(refused):
        trained, size, bits, stage = told
        assert "cannot be trained" in trained
        assert "group_size 7" in size
        assert "num_bits" in bits
        assert "stage to 3" in stage
