# SPDX-License-Identifier: Apache-2.0
"""Optimized layers against plain arithmetic: frozen base, adapters, quantized base, loading, saving, training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.linear import (
    Init,
    LoRAConfig,
    LoRAOptimizedLinear,
    OptimizedLinear,
    QuantizationConfig,
    QuantizedLinear,
    QuantizedParameter,
    init_lora,
    lora_state_dict,
    offload_base_weights,
)

QUANT = QuantizationConfig(group_size=32)


def adapted(**options):
    """A layer whose adapters do something."""
    torch.manual_seed(0)
    config = LoRAConfig(lora_r=4, lora_alpha=8.0, **options.pop("lora", {}))
    layer = OptimizedLinear(16, 10, lora_config=config, dtype=torch.float32, **options)
    nn.init.normal_(layer.lora_weight_2.weight)
    return layer


def by_hand(layer, x):
    """The definition, in fp64, from the layer's whole base weight."""
    base = layer.full_weight().double()
    down, up = (w.weight.detach().double() for w in (layer.lora_weight_1, layer.lora_weight_2))
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    return (
        x.double() @ base.T + bias + layer.lora_config.lora_alpha / 4 * (x.double() @ down.T @ up.T)
    )


# - which class


def test_each_request_has_its_class():
    plain = OptimizedLinear(16, 8)
    assert type(plain) is nn.Linear and plain.weight.dtype == torch.bfloat16
    assert plain.weight.requires_grad and plain.bias is None
    assert type(OptimizedLinear(16, 8, quantization_config=QUANT)) is QuantizedLinear
    assert type(OptimizedLinear(16, 8, lora_config=LoRAConfig())) is LoRAOptimizedLinear


@pytest.mark.parametrize("argument", ["lora_config", "quantization_config"])
def test_other_configurations_are_refused(argument):
    with pytest.raises(ValueError, match="Expecting"):
        OptimizedLinear(16, 8, **{argument: {}})


# - LoRA


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_output_and_gradients_are_those_of_the_definition(bias, quantized, offload):
    layer = adapted(
        bias=bias, lora={"offload": offload}, quantization_config=QUANT if quantized else None
    )
    x = torch.randn(3, 5, 16, requires_grad=True)
    got = layer(x)
    torch.testing.assert_close(got.double(), by_hand(layer, x.detach()), rtol=1e-5, atol=1e-5)
    got.square().sum().backward()

    y = x.detach().double().requires_grad_()
    down = layer.lora_weight_1.weight.detach().double().requires_grad_()
    up = layer.lora_weight_2.weight.detach().double().requires_grad_()
    base = layer.full_weight().double()
    offset = 0 if layer.bias is None else layer.bias.detach().double()
    (y @ base.T + offset + 2.0 * (y @ down.T @ up.T)).square().sum().backward()
    # fp32 against fp64 over sums of 16 products and 15 rows.
    for ours, theirs in (
        (x, y),
        (layer.lora_weight_1.weight, down),
        (layer.lora_weight_2.weight, up),
    ):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    assert layer.bias is None or layer.bias.grad is None


def test_new_adapters_change_nothing_and_only_they_train():
    layer = OptimizedLinear(16, 10, lora_config=LoRAConfig(lora_r=4), dtype=torch.float32)
    x = torch.randn(2, 16)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert layer.lora_weight_1.weight.abs().max() > 0
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_weight_1.weight", "lora_weight_2.weight"]
    assert layer.lora_scaling_factor == 4.0


def test_frozen_base_that_is_made_anew_is_not_saved_for_backward():
    layer = adapted(quantization_config=QUANT)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        layer(torch.randn(2, 16, requires_grad=True))
    assert torch.Size([10, 16]) not in saved


def test_disabled_layer_is_plain_and_frozen():
    config = LoRAConfig(lora_r=4, delay_lora_init=True)
    layer = OptimizedLinear(16, 10, lora_config=config, dtype=torch.float32)
    layer.disable()
    layer.init_lora()
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert not layer.weight.requires_grad
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_delayed_adapters_come_with_init_lora_and_once():
    config = LoRAConfig(lora_r=4, delay_lora_init=True)
    layer = OptimizedLinear(16, 10, lora_config=config, dtype=torch.float32)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    layer.init_lora()
    first = layer.lora_weight_1
    layer.init_lora()
    assert layer.lora_weight_1 is first


def test_base_without_values_cannot_get_adapters():
    config = LoRAConfig(lora_r=4, delay_lora_init=True)
    layer = OptimizedLinear(16, 10, lora_config=config, device="meta")
    with pytest.raises(RuntimeError, match="no values yet"):
        layer.init_lora()


def test_sharding_needs_all_ranks():
    with pytest.raises(AssertionError, match="base_weight_sharding=2 on 1 ranks"):
        OptimizedLinear(16, 10, lora_config=LoRAConfig(base_weight_sharding=2))


def test_offload_takes_a_share_of_the_base_in_the_order_of_layers():
    config = LoRAConfig(lora_r=2, offload_ratio=0.5)
    layers = nn.Sequential(*[OptimizedLinear(16, 16, lora_config=config) for _ in range(4)])
    assert offload_base_weights(layers) == 2
    assert [layer.weight.ds_offload for layer in layers] == [True, True, False, False]


# - quantized weights


@pytest.mark.parametrize("bits", [8, 6, 12, 4])
def test_quantized_parameter_holds_bytes_and_gives_values(bits):
    values = torch.randn(8, 64)
    config = QuantizationConfig(q_bits=bits, group_size=64)
    param = QuantizedParameter(values, quantization_config=config)
    assert param.dtype == torch.uint8 and param.shape == (8, 64 * bits // 8 + 4)
    assert isinstance(param, nn.Parameter) and not param.requires_grad
    got = param.dequantized()
    assert got.shape == values.shape and got.dtype == values.dtype
    worst = {4: 0.26, 6: 0.13, 8: 0.07, 12: 0.005}[bits]  # half a step of the mantissa, of max|x|
    assert (got - values).abs().max() <= worst * values.abs().max()


def test_quantized_parameter_survives_copies_and_pickles():
    param = QuantizedParameter(torch.randn(4, 32), quantization_config=QUANT)
    want = param.dequantized()
    for other in (
        copy.deepcopy(param),
        copy.copy(param),
        pickle.loads(pickle.dumps(param)),
        param.cpu(),
    ):
        assert type(other) is QuantizedParameter
        assert torch.equal(other.dequantized(), want)
    assert param.to(torch.bfloat16).dequantized().dtype == torch.bfloat16
    assert param.dequantized().dtype == torch.float32
    param.offload()
    assert torch.equal(param.dequantized(), want)


def test_quantized_parameter_refuses_gradients_and_bare_bytes():
    with pytest.raises(ValueError, match="requires_grad=True is not supported"):
        QuantizedParameter(torch.randn(4, 32), requires_grad=True)
    with pytest.raises(ValueError, match="quantizer"):
        QuantizedParameter(torch.zeros(4, dtype=torch.uint8))


def test_quantized_linear_is_the_product_with_its_values():
    layer = QuantizedLinear(32, 8, bias=True, quantization_config=QUANT, dtype=torch.float32)
    x = torch.randn(3, 32, requires_grad=True)
    want = nn.functional.linear(x, layer.weight.dequantized(), layer.bias)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(got.sum(), [x])
    torch.testing.assert_close(grad, layer.weight.dequantized().sum(0).expand(3, 32))


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_of_plain_and_of_quantized_weights_are_loaded(lora):
    config = LoRAConfig(lora_r=4) if lora else None
    options = {"lora_config": config, "quantization_config": QUANT, "dtype": torch.float32}
    layer = OptimizedLinear(32, 8, **options)
    weight = torch.randn(8, 32)
    layer.load_state_dict({"weight": weight}, strict=False)
    want = QuantizedParameter(weight, quantization_config=QUANT).dequantized()
    assert torch.equal(layer.weight.dequantized(), want)
    other = OptimizedLinear(32, 8, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dequantized(), want)


# - whole models


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.mix = nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, x):
        return self.mix(self.q_proj(x))


def test_init_replaces_the_layers_that_are_named_and_loads_as_usual():
    plain = Block()
    with Init(lora_config=LoRAConfig(lora_r=4, offload_ratio=1.0)):
        net = Block()
    assert type(net.q_proj) is LoRAOptimizedLinear and type(net.mix[0]) is nn.Linear
    assert type(Block().q_proj) is nn.Linear
    net.load_state_dict(plain.state_dict())
    init_lora(net)
    x = torch.randn(2, 16)
    rounded = net.mix(plain.q_proj.bfloat16()(x.bfloat16()).float())
    torch.testing.assert_close(
        net(x), rounded, rtol=0, atol=1e-2
    )  # a sum below 2 rounded once more
    assert {p.dtype for p in net.q_proj.parameters()} == {torch.bfloat16}
    assert net.mix[0].weight.dtype == torch.float32
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained == ["q_proj.lora_weight_1.weight", "q_proj.lora_weight_2.weight"]
    assert net.q_proj.weight.ds_offload


def test_a_model_without_any_of_the_names_gets_adapters_everywhere():
    with Init(lora_config=LoRAConfig(lora_r=4)):
        net = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(16, 16) for _ in range(2))})
    x = torch.randn(2, 16)
    expected = net["layers"][1](net["layers"][0](x))
    net.half()  # a model of 16 bits stays as it is
    init_lora(net)
    assert all(type(layer) is LoRAOptimizedLinear for layer in net["layers"])
    assert net["layers"][1].lora_weight_1.weight.dtype == torch.float16
    assert net["layers"][1](x).dtype == torch.float32
    found = net["layers"][1](net["layers"][0](x))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # values below 2 in fp16, twice
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora_weight" in name for name in trained)


def test_init_with_quantization_alone_takes_every_linear():
    with Init(quant_config=QUANT):
        net = Block()
    assert type(net.q_proj) is QuantizedLinear and type(net.mix[0]) is QuantizedLinear
    init_lora(net)
    assert isinstance(net.mix[0].weight, QuantizedParameter)
    assert net(torch.randn(2, 16)).shape == (2, 16)


def test_adapters_are_saved_whole_or_not_at_all():
    with Init(lora_config=LoRAConfig(lora_r=4)):
        net = Block()
    init_lora(net)
    saved = lora_state_dict(net, prefix="base.")
    assert list(saved) == [f"base.q_proj.lora_weight_{i}.weight" for i in (1, 2)]
    net.q_proj.lora_weight_1.weight.data = torch.empty(0)  # what a sharded parameter looks like
    with pytest.raises(RuntimeError, match=r"empty tensors, the first q_proj\.lora_weight_1"):
        lora_state_dict(net)
    with pytest.raises(RuntimeError, match="no adapters"):
        lora_state_dict(nn.Linear(2, 2))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("quantized", [False, True])
def test_training_moves_adapters_as_a_plain_loop_does(stage, quantized):
    torch.manual_seed(1)
    quant = QUANT if quantized else None
    with Init(lora_config=LoRAConfig(lora_r=4), quant_config=quant):
        net = Block()
    init_lora(net)
    net.float()  # exact sums, so that the two loops can be compared
    plain = copy.deepcopy(net)
    base = net.q_proj.full_weight().clone()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=net, config=config)
    adapters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=0.01)
    for _ in range(3):
        x = torch.randn(2, 16)
        loss = engine(x).square().sum()
        engine.backward(loss)
        engine.step()
        want = plain(x).square().sum()
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        torch.testing.assert_close(loss, want)
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours, theirs, msg=name)
    assert torch.equal(net.q_proj.full_weight(), base)
    engine.destroy()
