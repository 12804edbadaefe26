# SPDX-License-Identifier: Apache-2.0
"""Group quantization of weights: values, error bounds, sizes, and the layers that use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepspeed.inference.quantization.layers import QuantizedEmbedding, QuantizedLinear
from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization
from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer
from deepspeed.ops import group_quant
from deepspeed.ops.group_quant import GroupScheme
from deepspeed.runtime.zero.codec import GroupCodec
from deepspeed.utils.errors import DeepSpeedConfigError

# Made with DeepSpeed 0.19.8 on the CPU in fp32.
UPSTREAM = json.loads((Path(__file__).parent / "quantized_0_19_8.json").read_text("utf-8"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def settings(bits=4, size=4, dim=1, symmetric=False):
    return {"num_bits": bits, "group_size": size, "group_dim": dim, "symmetric": symmetric}


def there_and_back(values, config):
    codes, scale, least = Quantizer(config).quantize(values)
    return DeQuantizer(config, values.dtype).dequantize(codes, scale, least), scale


@pytest.mark.parametrize("case", UPSTREAM, ids=lambda case: str(list(case["config"].values())))
def test_codes_scales_and_values_are_those_of_0_19_8(case):
    values = torch.tensor(case["values"])
    codes, scale, least = Quantizer(case["config"]).quantize(values)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == case["codes"]
    assert torch.equal(scale, torch.tensor(case["scale"]))
    assert torch.equal(least, torch.tensor(case["least"]))
    decoded = DeQuantizer(case["config"], torch.float32).dequantize(codes, scale, least)
    assert torch.equal(decoded, torch.tensor(case["decoded"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_further_than_half_a_level(bits, dim, symmetric, dtype):
    torch.manual_seed(1)
    values = (torch.randn(36, 24) * torch.logspace(-3, 3, 24)).to(dtype)
    config = settings(bits, 12, dim, symmetric)
    before = values.clone()
    got, scale = there_and_back(values, config)
    assert torch.equal(values, before)
    assert got.dtype == dtype and got.shape == values.shape
    scheme = GroupScheme.of(config)
    level = scheme.grouped(torch.empty(36, 24)).double().fill_(1) / scale.double()
    error = (scheme.grouped(got).double() - scheme.grouped(values).double()).abs()
    # Half a level, and the result's own rounding to its dtype. A scale rounded up by eps may push the largest code
    # over the top, which costs up to top * eps levels.
    eps = torch.finfo(dtype).eps
    slack = (scheme.grouped(got).double().abs() + level) * eps
    assert (error <= level * (0.5 + scheme.top * eps) + slack).all()
    if dtype == torch.float32:
        assert (error > 0.2 * level).any()  # it is no identity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_constant_and_tiny_groups_keep_their_values(bits, dtype):
    values = torch.tensor([[3.0] * 4, [0.0] * 4, [-7.0] * 4, [1e-4, 2e-4, 3e-4, 4e-4]]).to(dtype)
    got, scale = there_and_back(values, settings(bits))
    assert scale.isfinite().all()
    assert torch.equal(got[:3], values[:3])
    # The scale cannot be larger than the largest number, so neither can levels be finer than its inverse.
    level = max(3e-4 / (2**bits - 1), 1 / torch.finfo(dtype).max)
    assert (got[3] - values[3]).abs().max() <= 0.5 * level + 4e-4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_groups_keep_zero_and_both_ends(bits):
    values = torch.tensor([[0.0, 5.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    got, _ = there_and_back(values, settings(bits, symmetric=True))
    assert torch.equal(got, values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad):
    values = torch.tensor([[1.0, bad, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    got, _ = there_and_back(values, settings(8))
    assert not got[0].isfinite().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("dim", [0, 1])
def test_chunks_do_not_show(dim, monkeypatch):
    values = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
    config = settings(4, 4, dim)
    whole = (*Quantizer(config).quantize(values), there_and_back(values, config)[0])
    monkeypatch.setattr(group_quant, "_CPU_CHUNK", 50)
    pieces = (*Quantizer(config).quantize(values), there_and_back(values, config)[0])
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize(
    ("shape", "config", "word"),
    [
        ((8, 10), settings(), "group_size 4"),
        ((10, 8), settings(dim=0), "group_dim 0"),
        ((8, 8), settings(dim=2), "group_dim 2"),
        ((2, 4), settings(size=8), "group_size 8"),
        ((8, 3), settings(size=3), "even last dimension"),
        ((0, 8), settings(), "shape"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(shape, config, word):
    with pytest.raises(ValueError, match=word):
        Quantizer(config).quantize(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_bits": 3}, "num_bits"),
        ({"num_bits": None}, "num_bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "auto"}, "group_size"),
        ({"group_dim": -1}, "group_dim"),
        ({"symmetric": "no"}, "symmetric"),
        ({"group": 1}, "group"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, word):
    with pytest.raises(DeepSpeedConfigError, match=word):
        Quantizer({**settings(), **change})


def test_bits_and_group_size_must_be_given_and_the_rest_has_defaults():
    with pytest.raises(DeepSpeedConfigError, match="group_size"):
        Quantizer({"num_bits": 4})
    assert GroupScheme.of({"num_bits": 4, "group_size": 8}) == GroupScheme(4, 8, 1, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "share"),
    # Bytes of a weight of 64 x 96 in groups of 32: codes, and one or two numbers a group.
    [
        (settings(4, 32), lambda wide: 0.5 + 2 * wide / 32),
        (settings(8, 32, 0), lambda wide: 1 + 2 * wide / 32),
        (settings(4, 32, symmetric=True), lambda wide: 0.5 + wide / 32),
    ],
)
def test_codec_keeps_values_in_as_few_bytes_as_it_says(config, share, dtype):
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    codec = GroupCodec.of(GroupScheme.of(config), values)
    data = codec.encode(values)
    assert data.dtype == torch.uint8
    assert data.numel() == codec.nbytes == 64 * 96 * share(dtype.itemsize)
    assert torch.equal(codec.decode(data), there_and_back(values, config)[0])
    # a larger buffer, as gathering makes them
    assert torch.equal(codec.decode(torch.cat([data, data[:3]])), codec.decode(data))


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(4)
        self.embed = torch.nn.Embedding(16, 8, padding_idx=0, dtype=dtype)
        self.fc1 = torch.nn.Linear(8, 16, dtype=dtype)
        self.fc2 = torch.nn.Linear(16, 6, bias=False, dtype=dtype)
        self.norm = torch.nn.LayerNorm(6, dtype=dtype)

    def forward(self, ids):
        return self.norm(self.fc2(torch.tanh(self.fc1(self.embed(ids)))))


def by_hand(net, schemes):
    """The same model with plain weights that went there and back."""
    for name, config in schemes.items():
        weight = net.get_submodule(name).weight
        weight.data = there_and_back(weight.data, config)[0]
    return net


@pytest.mark.parametrize("dtype", DTYPES)
def test_replaced_layers_compute_with_the_quantized_weights(dtype):
    config = {"fc": settings(4), "embed": settings(8, 4, 0)}
    net = Net(dtype).eval()
    bias = net.fc1.bias
    got = _init_group_wise_weight_quantization(
        net, {"weight_quantization": {"post_init_quant": config}}
    )
    assert got is net
    assert [type(m) for m in (net.embed, net.fc1, net.fc2)] == [
        QuantizedEmbedding,
        QuantizedLinear,
        QuantizedLinear,
    ]
    assert net.fc1.bias is bias and net.fc2.bias is None and not net.fc1.training
    for module in (net.embed, net.fc1, net.fc2):
        assert module.weight.dtype == torch.uint8 and not module.weight.requires_grad
    ids = torch.tensor([[0, 3, 15]])
    want = by_hand(Net(dtype), {"embed": settings(8, 4, 0), "fc1": settings(4), "fc2": settings(4)})
    assert torch.equal(net(ids), want(ids))
    assert net(ids).dtype == dtype


def test_quantized_layers_save_and_load():
    config = {"weight_quantization": {"post_init_quant": {"fc": settings()}}}
    net = _init_group_wise_weight_quantization(Net(), config)
    other = Net()
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(2)
    _init_group_wise_weight_quantization(other, config)
    other.load_state_dict(net.state_dict())
    ids = torch.tensor([1, 2])
    assert torch.equal(other(ids), net(ids))


def test_a_shared_layer_is_replaced_once():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
    net["b"] = net["a"]
    _init_group_wise_weight_quantization(
        net, {"weight_quantization": {"post_init_quant": {"a": settings()}}}
    )
    assert type(net["a"]) is QuantizedLinear


def test_a_key_that_fits_nothing_is_told_and_two_for_one_are_refused(caplog):
    from deepspeed.utils.logging import logger

    logger.addHandler(caplog.handler)
    try:
        _init_group_wise_weight_quantization(
            Net(), {"weight_quantization": {"post_init_quant": {"attention": settings()}}}
        )
    finally:
        logger.removeHandler(caplog.handler)
    assert "attention" in caplog.text
    with pytest.raises(DeepSpeedConfigError, match=r"fc1.*'fc', 'fc1'|'fc1', 'fc'"):
        _init_group_wise_weight_quantization(
            Net(),
            {"weight_quantization": {"post_init_quant": {"fc1": settings(), "fc": settings()}}},
        )
    for nothing in ({}, {"weight_quantization": {}}):
        with pytest.raises(DeepSpeedConfigError, match="post_init_quant"):
            _init_group_wise_weight_quantization(Net(), nothing)
