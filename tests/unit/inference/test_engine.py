# SPDX-License-Identifier: Apache-2.0
"""`init_inference` around any module: dtype, place, refusals, prompts, times, and weights that come from files."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.inference import graphs
from deepspeed.utils.errors import DeepSpeedCheckpointError


class Speaker(nn.Module):
    """A module that can generate, and tells what it was asked."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.inner(x)

    def generate(self, *args, **kwargs):
        return args, kwargs


def engine(model=None, **options):
    return deepspeed.init_inference(model or Speaker(), **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("dtype", ["fp32", "bf16", torch.float16])
def test_the_model_computes_in_the_dtype_without_training(dtype):
    model = Speaker()
    want = model.inner(torch.ones(1, 4))
    wrapped = engine(model, dtype=dtype)
    assert wrapped.module is model
    assert not model.training
    assert model.inner.weight.dtype == wrapped.dtype
    found = wrapped(torch.ones(1, 4, dtype=wrapped.dtype))
    assert found.dtype == wrapped.dtype
    torch.testing.assert_close(found.float(), want, rtol=2e-2, atol=2e-2)  # bf16 has 8 bits
    assert deepspeed.dist is deepspeed.comm
    assert wrapped.inner is model.inner  # names fall through


def test_frequencies_of_rotary_embeddings_keep_their_bits():
    model = Speaker()
    frequencies = 10000.0 ** -torch.linspace(0, 1, 8)
    model.inner.register_buffer("inv_freq", frequencies.clone(), persistent=False)
    wrapped = engine(model, dtype=torch.bfloat16)
    assert torch.equal(wrapped.module.inner.inv_freq, frequencies)
    assert wrapped.module.table.dtype == torch.bfloat16


def test_half_precision_is_the_default():
    assert deepspeed.init_inference(nn.Linear(2, 2)).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype=torch.int8 is not available"),
        ({"enable_cuda_graph": True}, "enable_cuda_graph without a CUDA device"),
        ({"moe": {"ep_size": 2}}, "moe.ep_size=2"),
        ({"zero": {"stage": 3}}, "Use deepspeed.initialize with stage 3"),
        ({"training_mp_size": 2}, "training_mp_size"),
        ({"save_mp_checkpoint_path": "x"}, "save_mp_checkpoint_path"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one refusal is of a machine without CUDA")
def test_what_is_not_built_is_refused_by_name(options, words):
    with pytest.raises(deepspeed.DeepSpeedConfigError, match=words):
        engine(**options)


def test_configurations_join_and_may_not_differ(tmp_path):
    path = tmp_path / "inference.json"
    path.write_text('{"dtype": "fp32", max_tokens: 8,}', encoding="utf-8")
    assert deepspeed.init_inference(nn.Linear(2, 2), str(path)).dtype == torch.float32
    assert deepspeed.init_inference(nn.Linear(2, 2), {"dtype": "fp32"}, dtype="fp32")
    with pytest.raises(ValueError, match="Conflicting argument 'dtype'"):
        deepspeed.init_inference(nn.Linear(2, 2), {"dtype": "fp32"}, dtype="fp16")
    with pytest.raises(ValueError, match="dytpe"):
        deepspeed.init_inference(nn.Linear(2, 2), dytpe="fp16")


def test_generate_passes_on_and_refuses_beams_of_kernels_and_long_prompts():
    wrapped = engine(max_tokens=8)
    ids = torch.ones(1, 8, dtype=torch.long)
    args, kwargs = wrapped.generate(ids, do_sample=True)
    assert args[0] is ids
    assert kwargs == {"do_sample": True}
    assert wrapped.generate(ids, num_beams=2)[1] == {"num_beams": 2}
    with pytest.raises(NotImplementedError, match="num_beams=2"):
        engine(max_tokens=8, replace_with_kernel_inject=True).generate(ids, num_beams=2)
    for call in ({"input_ids": torch.ones(1, 9)}, {"inputs": torch.ones(1, 9)}):
        with pytest.raises(RuntimeError, match="got 9 tokens, expected at most max_out_tokens=8"):
            wrapped.generate(**call)
    with pytest.raises(AttributeError, match="Linear has no method generate"):
        engine(nn.Linear(2, 2)).generate(ids)


def test_times_are_taken_once_asked_for():
    wrapped = engine()
    with pytest.raises(AssertionError, match="not enabled"):
        wrapped.model_times()
    wrapped.profile_model_time()
    for _ in range(2):
        wrapped(torch.ones(1, 4))
    times = wrapped.model_times()
    assert len(times) == 2
    assert all(0 < time < 10_000 for time in times)
    assert wrapped.model_times() == []


def test_an_unknown_class_with_injection_runs_as_it_is(caplog):
    import logging

    from deepspeed.utils.logging import logger

    logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            wrapped = engine(replace_with_kernel_inject=True)
    finally:
        logger.propagate = False
    assert wrapped.decoder is None
    assert "class Speaker is none of GPT2LMHeadModel" in caplog.text
    with pytest.raises(NotImplementedError, match="no fused program: got Linear"):
        deepspeed.replace_transformer_layer(None, nn.Linear(2, 2))


# - weights from files


def on_meta():
    with deepspeed.OnDevice(dtype=torch.float32, device="meta"):
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def save_parts(folder):
    source = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    state = source.state_dict()
    for number in (0, 1):
        part = {k: v for k, v in state.items() if k.startswith(str(number))}
        torch.save(part, folder / f"pytorch_model-{number}.bin")
    return source


def describe(folder, form):
    names = ["pytorch_model-0.bin", "pytorch_model-1.bin"]
    described = {"type": "ds_model", "checkpoints": names, "version": 1.0}
    if form == "folder":
        return {"checkpoint": str(folder)}
    if form == "dict":
        return {"checkpoint": {**described, "base_dir": str(folder)}}
    if form == "base":
        return {"checkpoint": described, "base_dir": str(folder)}
    if form == "index":
        index = {"weight_map": {"0.weight": names[0], "1.weight": names[1]}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        return {"checkpoint": str(folder)}
    (folder / "parts.json").write_text(json.dumps(described), encoding="utf-8")
    return {"checkpoint": str(folder / "parts.json")}


@pytest.mark.parametrize("form", ["folder", "dict", "base", "index", "json"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_weights_gets_those_of_a_checkpoint(form, dtype, tmp_path):
    source = save_parts(tmp_path)
    wrapped = engine(on_meta(), dtype=dtype, **describe(tmp_path, form))
    for name, value in source.state_dict().items():
        assert torch.equal(wrapped.module.state_dict()[name], value.to(dtype))


def test_a_model_with_weights_takes_those_of_a_checkpoint_of_ours(tmp_path):
    source = save_parts(tmp_path)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": source.state_dict(), "global_steps": 3}, path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    wrapped = engine(model, checkpoint=str(path))
    x = torch.randn(2, 4)
    assert torch.equal(wrapped(x), source(x))


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match="built without weights"):
        engine(on_meta())
    with pytest.raises(DeepSpeedCheckpointError, match="is not there"):
        engine(on_meta(), checkpoint=str(tmp_path / "none.pt"))
    with pytest.raises(DeepSpeedCheckpointError, match="holds no weights"):
        engine(on_meta(), checkpoint=str(tmp_path))
    with pytest.raises(DeepSpeedCheckpointError, match="split for tensor parallelism"):
        engine(on_meta(), checkpoint={"checkpoints": {"tp": ["a"], "non_tp": ["b"]}})
    with pytest.raises(DeepSpeedCheckpointError, match="files of the checkpoint are missing"):
        engine(on_meta(), checkpoint={"checkpoints": ["a.bin"], "base_dir": str(tmp_path)})
    torch.save({"0.weight": torch.zeros(3, 4)}, tmp_path / "a.bin")
    with pytest.raises(DeepSpeedCheckpointError, match=r"no value for .*: got 0\.bias, 1\.weight"):
        engine(on_meta(), checkpoint=str(tmp_path / "a.bin"))
    torch.save({"0.weight": torch.zeros(4, 4)}, tmp_path / "a.bin")
    with pytest.raises(DeepSpeedCheckpointError, match=r"got \(4, 4\), expected \(3, 4\)"):
        engine(on_meta(), checkpoint=str(tmp_path / "a.bin"))
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(DeepSpeedCheckpointError, match="is no JSON"):
        engine(on_meta(), checkpoint=str(tmp_path / "broken.json"))


# - graphs, with an accelerator that records calls in place of work on a device


class Recorder:
    """Stands for an accelerator with graphs: a replay runs the captured function again."""

    def __init__(self, again):
        self.again, self.captures, self.replays = again, 0, 0

    def Stream(self):
        return None

    def stream(self, stream):
        import contextlib

        return contextlib.nullcontext()

    def synchronize(self):
        pass

    def create_graph(self):
        self.captures += 1
        return self.captures

    def capture_to_graph(self, graph):
        return self.stream(None)

    def replay_graph(self, graph):
        self.replays += 1
        self.again(graph)


def test_one_capture_serves_all_inputs_of_a_form(monkeypatch):
    seen = []

    def function(x, scale=1):
        seen.append(x)
        return x * scale

    accelerator = Recorder(lambda graph: None)
    monkeypatch.setattr(graphs, "get_accelerator", lambda: accelerator)
    run = graphs.ForwardGraphs(function)
    run(torch.ones(2), scale=3)
    static = seen[-1]
    run(torch.full((2,), 7.0), scale=3)
    assert torch.equal(static, torch.full((2,), 7.0))  # where the graph reads
    assert (accelerator.captures, accelerator.replays) == (1, 2)
    run(torch.ones(3), scale=3)
    run(torch.ones(2), scale=4)
    assert accelerator.captures == 3
