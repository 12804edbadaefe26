# SPDX-License-Identifier: Apache-2.0
"""On a GPU: engines of every stage and place step as a plain loop of torch does, save, resume, generate and compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

STEPS, WIDTH = 6, 64
# of losses near 1: each step's rounding of weights and activations in the compute dtype
BOUND = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x).float().square().mean()


def net():
    torch.manual_seed(7)
    return Net()


def batches(steps=STEPS):
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(8, WIDTH, generator=draw).cuda() for _ in range(steps)]


def plain_losses(clip=1.0):  # the default of gradient_clipping
    torch.backends.cuda.matmul.allow_tf32 = False
    model = net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for x in batches():
        loss = model(x)
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def engine_of(stage, dtype="fp32", optimizer="AdamW", numbers=None, **more):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": optimizer, "params": numbers or {"lr": 1e-3, "weight_decay": 0.01}},
        "zero_optimization": zero,
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
        **more,
    }
    if dtype == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    return deepspeed.initialize(model=net(), config=config)[0]


def trained(engine, steps=None):
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for x in steps or batches():
        loss = engine(x.to(dtype))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


CPU, NVME = {"device": "cpu", "pin_memory": True}, {"device": "nvme"}
PLACES = {
    "device": {},
    "optimizer": {"offload_optimizer": CPU},
    "pageable": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "half": {"offload_optimizer": {**CPU, "ratio": 0.5}},
    "params": {"offload_optimizer": CPU, "offload_param": CPU},
    "super": {"offload_optimizer": {**CPU, "super_offload": True}},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_are_those_of_a_plain_loop(stage, place, dtype):
    if place in ("params", "super", "half") and stage < 3:
        pytest.skip("a place of stage 3")
    if place in ("optimizer", "pageable") and stage == 0:
        pytest.skip("stage 0 does not offload")
    engine = engine_of(stage, dtype, zero=dict(PLACES[place]), gradient_clipping=0.5)
    assert engine.device.type == "cuda"
    losses = trained(engine)
    torch.testing.assert_close(losses, plain_losses(0.5), rtol=BOUND[dtype], atol=BOUND[dtype])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_states_on_nvme_step_as_on_the_device(stage, tmp_path):
    places = {"offload_optimizer": {**NVME, "nvme_path": str(tmp_path)}}
    if stage == 3:
        places["offload_param"] = {**NVME, "nvme_path": str(tmp_path)}
    losses = trained(engine_of(stage, "bf16", zero=places))
    torch.testing.assert_close(losses, plain_losses(), rtol=BOUND["bf16"], atol=BOUND["bf16"])


@pytest.mark.parametrize(
    "optimizer", ["Adam", "Lion", "Adagrad", "Lamb", "SGD", "Muon", "OneBitAdam", "OneBitLamb"]
)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizers_train(optimizer, stage):
    if stage and optimizer.startswith("OneBit"):
        pytest.skip("1-bit optimizers shard nothing")
    engine = engine_of(stage, "bf16", optimizer, {"lr": 1e-3}, zero_allow_untested_optimizer=True)
    same = [batches()[0]] * 8
    losses = trained(engine, same)
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("place", ["device", "optimizer"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_resumes(stage, place, tmp_path):
    if stage == 0 and place == "optimizer":
        pytest.skip("stage 0 does not offload")
    first = engine_of(stage, "bf16", zero=dict(PLACES[place]))
    trained(first, batches()[:3])
    first.save_checkpoint(str(tmp_path), tag="t")
    ahead = trained(first, batches()[3:])
    second = engine_of(stage, "bf16", zero=dict(PLACES[place]))
    second.load_checkpoint(str(tmp_path), tag="t")
    assert trained(second, batches()[3:]) == ahead


def test_states_move_to_the_host_and_back():
    engine = engine_of(3, "bf16")
    trained(engine)
    before = torch.cuda.memory_allocated()
    engine.offload_states()
    assert torch.cuda.memory_allocated() < before
    engine.reload_states()
    trained(engine)


def test_zenflow_trains():
    section = {
        "topk_ratio": 0.1,
        "update_interval": 2,
        "select_strategy": "step",
        "select_interval": 2,
    }
    engine = engine_of(
        2, "bf16", zero={"offload_optimizer": CPU, "zenflow": section, "overlap_comm": True}
    )
    losses = trained(engine, [batches()[0]] * 10)
    assert losses[-1] < losses[0], losses


def test_autocast_and_activation_checkpoints_train():
    engine = engine_of(2, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    losses = trained(engine)
    torch.testing.assert_close(losses, plain_losses(), rtol=BOUND["bf16"], atol=BOUND["bf16"])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("stage", [1, 3])
def test_deepcompile_keeps_the_losses(stage, backend):
    engine = engine_of(stage, compile={"deepcompile": True})
    engine.compile(backend=backend)
    torch.testing.assert_close(trained(engine), plain_losses(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_compiled_engine_keeps_the_losses(stage):
    engine = engine_of(stage)
    engine.compile()
    torch.testing.assert_close(trained(engine), plain_losses(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_generated_tokens_are_the_models(family, graph):
    transformers = pytest.importorskip("transformers")
    names = {"gpt2": "GPT2", "opt": "OPT", "llama": "Llama"}
    small = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "gpt2":
        small = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2}
    if family == "opt":
        small |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    torch.manual_seed(3)
    config = getattr(transformers, f"{names[family]}Config")(**small)
    head = "GPT2LMHeadModel" if family == "gpt2" else f"{names[family]}ForCausalLM"
    model = getattr(transformers, head)(config).eval().cuda()
    prompt = torch.randint(3, 99, (2, 7), device="cuda")
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    engine = deepspeed.init_inference(
        model, dtype=torch.float32, replace_with_kernel_inject=True, enable_cuda_graph=graph
    )
    for _ in range(2):
        found = engine.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
        assert torch.equal(found, wanted)


def test_products_of_codes_and_pinned_memory():
    from deepspeed.accelerator import get_accelerator

    here = get_accelerator()
    assert here._name == "cuda" and here.communication_backend_name() in ("nccl", "gloo")
    assert here.is_pinned(here.pin_memory(torch.ones(4)))
    assert here.available_memory() > 0 and here.is_bf16_supported() is not None
