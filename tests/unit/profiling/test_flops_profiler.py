# SPDX-License-Identifier: Apache-2.0
"""The flops profiler against formulas written out by hand, torch's own counter, and an engine's step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import deepspeed
from deepspeed.profiling.flops_profiler import (
    FlopsProfiler,
    bytes_to_string,
    duration_to_string,
    flops_to_string,
    get_model_profile,
    macs_to_string,
    number_to_string,
    params_to_string,
)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


# name: module, shape of its input -> flops, multiply-accumulates, params
FORMULAS = {
    "linear": (nn.Linear(4, 8), (3, 4), (2 * 3 * 4 * 8, 3 * 4 * 8, 40)),
    "linear of more dimensions": (nn.Linear(4, 8, False), (2, 3, 4), (384, 192, 32)),
    "convolution": (
        nn.Conv2d(3, 5, 3),
        (2, 3, 8, 8),
        (2 * (2 * 36 * 5 * 27) + 2 * 36 * 5, 2 * 36 * 5 * 27, 140),
    ),
    "convolution in groups": (
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False),
        (2, 4, 8, 8),
        (2 * 2 * 16 * 8 * 18, 2 * 16 * 8 * 18, 144),
    ),
    "transposed convolution": (
        nn.ConvTranspose2d(3, 5, 3, bias=False),
        (2, 3, 8, 8),
        (2 * 2 * 64 * 3 * 45, 2 * 64 * 3 * 45, 135),
    ),
    "layer norm": (nn.LayerNorm(8), (3, 8), (5 * 24, 0, 16)),
    "layer norm without weights": (nn.LayerNorm(8, elementwise_affine=False), (3, 8), (96, 0, 0)),
    "batch norm in evaluation": (nn.BatchNorm2d(3), (2, 3, 4, 4), (2 * 96, 0, 6)),
    "activation": (nn.GELU(), (3, 8), (24, 0, 0)),
    "softmax": (nn.Softmax(-1), (3, 8), (24, 0, 0)),
    "pooling": (nn.MaxPool2d(2), (2, 3, 4, 4), (96, 0, 0)),
    "arithmetic": (Call(lambda x: x * x + 1), (3, 8), (0, 0, 0)),
    "matmul": (Call(lambda x: x @ x.mT), (2, 3, 7, 8), (2 * 6 * 49 * 8, 6 * 49 * 8, 0)),
    "attention": (
        Call(lambda x: functional.scaled_dot_product_attention(x, x, x)),
        (2, 3, 7, 8),
        (2 * 2 * 6 * 49 * 8, 2 * 6 * 49 * 8, 0),
    ),
    "einsum": (Call(lambda x: torch.einsum("bij,bkj->bik", x, x)), (2, 7, 8), (1568, 784, 0)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_counts_are_those_of_the_formula(name):
    module, shape, want = FORMULAS[name]
    assert get_model_profile(module, shape, print_profile=False, as_string=False) == want


def test_embeddings_have_params_and_no_operations():
    found = get_model_profile(
        nn.Embedding(10, 4), args=[torch.zeros(2, 3).long()], print_profile=False, as_string=False
    )
    assert found == (0, 0, 40)


def test_counts_without_autograd_are_the_same():
    with torch.inference_mode():
        found = get_model_profile(nn.Linear(4, 8), (3, 4), print_profile=False, as_string=False)
    assert found == (192, 96, 40)


def block():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(16, 4, bias=False))


def test_products_agree_with_torchs_counter():
    model, x = block(), torch.randn(2, 5, 16)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.no_grad():  # training mode: the encoder's layers run one by one
        model(x)
    profiler.stop_profile()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    # torch's counter knows no attention of the CPU (4 * batch * length^2 * width flops)
    attention = 4 * 2 * 5 * 5 * 16
    assert 2 * profiler.get_total_macs() in (
        counter.get_total_flops(),
        counter.get_total_flops() + attention,
    )
    assert profiler.get_total_macs() == 2 * 5 * 16 * (48 + 16 + 32 + 32 + 4) + attention // 2


def test_each_module_has_its_share_and_a_shared_param_counts_once():
    inner = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(inner, nn.ReLU(), inner)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.ones(2, 4))
    profiler.stop_profile()
    assert profiler.records[inner].macs == profiler.records[model].macs == 2 * 32
    assert profiler.records[model].flops == 4 * 32 + 8
    assert profiler.get_total_params() == 16
    assert 0 < profiler.records[inner].duration <= profiler.get_total_duration()


def test_ignored_modules_count_for_nobody():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    found = get_model_profile(
        model, (2, 4), print_profile=False, as_string=False, ignore_modules=[nn.LayerNorm]
    )
    assert found == (64, 32, 28)


def test_a_forward_pass_that_raises_leaves_no_hook_and_no_mode():
    model = nn.Sequential(nn.Linear(4, 4), Call(lambda x: x.no_such_thing)).train()
    model[0].eval()
    with pytest.raises(AttributeError, match="no_such_thing"):
        get_model_profile(model, (2, 4), print_profile=False, warm_up=0)
    assert [part.training for part in model.modules()] == [True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_an_input_is_needed():
    with pytest.raises(ValueError, match=r"input_shape=\(1, 3, 224, 224\)"):
        get_model_profile(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="got backward, expected forward or generate"):
        get_model_profile(nn.Linear(4, 4), (1, 4), mode="backward")


def test_the_report_names_every_module_with_its_numbers(capsys):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    strings = get_model_profile(model, (3, 4), top_modules=2)
    assert strings == ("312 ", "144 MACs", "56")
    out = capsys.readouterr().out
    assert "- DeepSpeed Flops Profiler -" in out
    totals = "fwd MACs per GPU:                                                       144 MACs"
    assert totals in out
    assert "params      - {'Linear': '56', 'ReLU': '0'}" in out
    assert "(0): Linear(40 = 71.43% Params, 96 MACs = 66.67% MACs, " in out
    assert "in_features=4, out_features=8, bias=True)" in out


def test_the_report_can_go_to_a_file_without_the_model(tmp_path, capsys):
    path = tmp_path / "deep" / "profile.txt"
    get_model_profile(nn.Linear(4, 8), (3, 4), detailed=False, output_file=str(path))
    assert capsys.readouterr().out == ""
    text = path.read_text(encoding="utf-8")
    assert "fwd flops per GPU:" in text
    assert "Detailed" not in text


def test_numbers_are_short_and_have_a_prefix():
    assert [number_to_string(n) for n in (0, 0.5, 12, 1000, 123456, 1.5e9, 3e15, 2e-7)] == [
        "0 ",
        "500 m",
        "12 ",
        "1 K",
        "123.46 K",
        "1.5 G",
        "3000 T",
        "0.2 u",
    ]
    assert macs_to_string(1234567) == "1.23 MMACs"
    assert flops_to_string(123456, "G", 6) == "0.000123 GFLOPS"
    assert params_to_string(7.1e9) == "7.1 B"
    assert duration_to_string(0.0123) == "12.3 ms"
    assert bytes_to_string(2e9) == "2 GB"
    with pytest.raises(ValueError, match="no such unit"):
        number_to_string(1, "Q")


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_profiles_the_step_that_was_asked_for(stage, tmp_path, capsys):
    path = tmp_path / "profile.txt"
    section = {"enabled": True, "profile_step": 1, "output_file": str(path)}
    engine, *_ = deepspeed.initialize(
        model=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)),
        config={
            "train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "flops_profiler": section,
        },
    )
    for step in range(3):
        for _ in range(2):
            engine.backward(engine(torch.ones(4, 8)).mean())
            engine.step()
        assert path.exists() == (step == 1)
        if step == 1:
            text = path.read_text(encoding="utf-8")
            path.unlink()
    assert "Profile Summary at step 1:" in text
    for row in ("world size", "batch size per GPU", "bwd latency", "step latency", "iter latency"):
        assert f"\n{row}:" in text
    assert engine.flops_profiler.params == 8 * 16 + 16 + 16 + 1
    assert engine.flops_profiler.macs == 4 * (8 * 16 + 16)
    assert engine.flops_profiler.flops == 2 * 4 * (8 * 16 + 16) + 4 * 16
