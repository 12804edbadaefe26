# SPDX-License-Identifier: Apache-2.0
"""Fused decoders of Hugging Face models: the tokens of the model's own `generate`, and what they leave to it."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

import deepspeed
from deepspeed.module_inject import decoder as program
from deepspeed.module_inject import generation
from deepspeed.module_inject.families import NotFused, read_weights

transformers = pytest.importorskip("transformers", minversion="4.41")
pytest.importorskip("transformers.modeling_utils", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

# weights large enough that the tokens of two prompts differ
WORDS = {"vocab_size": 96, "eos_token_id": 7, "pad_token_id": 0, "bos_token_id": 1}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}


def build(kind, **options):
    torch.manual_seed(0)
    kinds = {
        "gpt2": ("GPT2", {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}),
        "opt": ("OPT", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
        "llama": ("Llama", GATED),
        "llama of long texts": (
            "Llama",
            {**GATED, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        "mistral": ("Mistral", {**GATED, "sliding_window": None}),
        "qwen2": ("Qwen2", GATED),
    }
    name, config = kinds[kind]
    config = {**WORDS, **config, **options}
    if kind == "gpt2":
        config.setdefault("initializer_range", 0.3)
    config = getattr(transformers, f"{name}Config")(**config)
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config).eval()


KINDS = ("gpt2", "opt", "llama", "llama of long texts", "mistral", "qwen2")


def prompts(padded):
    ids = torch.randint(8, 96, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :4] = mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_models_own_generate(kind, padded, monkeypatch):
    plain = build(kind)
    engine = deepspeed.init_inference(
        copy.deepcopy(plain), dtype=torch.float32, replace_with_kernel_inject=True
    )
    ids, mask = prompts(padded)
    monkeypatch.setattr(engine.module, "generate", None)  # what follows is the program's work
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True},
    ):
        options = {"attention_mask": mask, "max_new_tokens": 40, **options}
        torch.manual_seed(5)
        want = plain.generate(ids, **options)
        torch.manual_seed(5)
        assert torch.equal(engine.generate(ids, **options), want)
    assert want.shape[1] > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_itself_goes_on_with_the_packed_weights(kind):
    plain = build(kind)
    packed = copy.deepcopy(plain)
    read_weights(packed)
    ids, mask = prompts(True)
    with torch.no_grad():
        found, want = (m(ids, attention_mask=mask).logits for m in (packed, plain))
    # the same numbers in another order in memory: sums may be taken in another order
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    for name, value in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value)
    memory = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed.parameters()
    }
    assert sum(memory.values()) == sum(4 * p.numel() for p in plain.parameters())  # nothing twice


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_the_models_within_its_rounding(kind, dtype):
    plain = build(kind).to(dtype)
    weights = read_weights(copy.deepcopy(plain))
    run = program.Decoder(weights)
    ids, _ = prompts(False)
    run.prepare(3, 12)
    with torch.no_grad():
        first = run.prefill(ids)
        token = first.argmax(-1)
        second = run.step(token, torch.full((3,), 9))
        both = torch.cat((ids, token[:, None]), 1)
        want = plain(both).logits[:, -2:].float()
    scale = want.std()
    for found, true in ((first, want[:, 0]), (second, want[:, 1])):
        assert (found.float() - true).abs().max() < 0.1 * scale  # a few bf16 roundings of 2^-8


class Recorder:
    """Stands for an accelerator with graphs; a replay runs the step once more on the same tensors."""

    Stream = None

    def __init__(self):
        self.captures = 0

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        pass

    def create_graph(self):
        self.captures += 1
        return self.captures

    def capture_to_graph(self, graph):
        return contextlib.nullcontext()

    def replay_graph(self, graph):
        self.run._logits.copy_(self.run._static_step())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_the_step_on_fixed_places_gives_the_same_tokens(kind, padded, monkeypatch):
    plain = build(kind)
    accelerator = Recorder()
    monkeypatch.setattr(program, "get_accelerator", lambda: accelerator)
    accelerator.run = run = program.Decoder(read_weights(copy.deepcopy(plain)), graphs=True)
    ids, mask = prompts(padded)
    for tokens in (30, 20):  # the second in the same cache, after what the first left there
        options = {"attention_mask": mask, "max_new_tokens": tokens, "do_sample": False}
        request = generation.understand(plain, 64, (ids,), options)
        assert torch.equal(generation.generate(run, request), plain.generate(ids, **options))
    assert accelerator.captures == 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4, "repetition_penalty": 1.2},
        {"max_new_tokens": 4, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 4, "return_dict_in_generate": True},
        {"max_new_tokens": 4, "num_return_sequences": 2, "do_sample": True},
        {"max_new_tokens": 4, "use_cache": False},
        {"max_new_tokens": 4, "streamer": object()},
        {"max_new_tokens": 100},  # beyond the model's positions
        {"max_new_tokens": 4, "attention_mask": torch.tensor([[1, 1, 0]])},
        {"max_new_tokens": 4, "inputs_embeds": torch.zeros(1, 3, 32)},
        {},
    ],
)
def test_other_requests_are_left_to_the_model(options):
    ids = torch.tensor([[9, 10, 11]])
    assert generation.understand(build("gpt2"), 64, (ids,), options) is None


def test_a_request_may_come_as_a_configuration_or_a_length():
    ids, model = torch.tensor([[9, 10, 0]]), build("gpt2")
    config = transformers.GenerationConfig(max_new_tokens=4, eos_token_id=[7, 8], pad_token_id=2)
    found = generation.understand(model, 64, (), {"input_ids": ids, "generation_config": config})
    assert (found.total, found.ends, found.pad, found.mask) == (7, (7, 8), 2, None)
    found = generation.understand(model, 64, (ids.flip(1),), {"max_length": 5})
    assert found.total == 5
    assert found.mask.tolist() == [[False, True, True]]  # 0 is the padding


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by the layer's number"),
        ("gpt2", {"activation_function": "tanh"}, "its activation is tanh"),
        ("opt", {"do_layer_norm_before": False}, "after each layer"),
        ("opt", {"word_embed_proj_dim": 16}, "projects its embeddings"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type dynamic"),
    ],
)
def test_settings_without_a_program_are_named(kind, options, words):
    with pytest.raises(NotFused, match=words):
        read_weights(build(kind, **options))


def test_modules_that_are_not_the_familys_own_are_named():
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda *args: None)
    with pytest.raises(NotFused, match="forward hooks"):
        read_weights(model)

    class Mine(torch.nn.Linear):
        pass

    model = build("llama")
    model.model.layers[0].self_attn.q_proj = Mine(32, 32)
    with pytest.raises(NotFused, match="class Mine"):
        read_weights(model)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_model_built_on_meta_is_filled_from_its_saved_folder(kind, tmp_path):
    plain = build(kind)
    plain.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(plain)(plain.config)
    engine = deepspeed.init_inference(
        empty, dtype=torch.float32, checkpoint=str(tmp_path), replace_with_kernel_inject=True
    )
    ids, mask = prompts(True)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = plain.generate(ids, **options)
    assert torch.equal(engine.generate(ids, **options), want)
    assert torch.equal(engine.module.generate(ids, **options), want)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_is_saved_as_it_was(kind, dtype, tmp_path):
    plain = build(kind).to(dtype)
    packed = copy.deepcopy(plain)
    read_weights(packed)
    packed.save_pretrained(tmp_path)
    found = type(plain).from_pretrained(tmp_path, torch_dtype=dtype)
    for name, value in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    packed.load_state_dict(build(kind).to(dtype).state_dict())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_with_a_decoder_is_pickled_without_it(kind, tmp_path):
    engine = deepspeed.init_inference(
        build(kind), dtype=torch.float32, replace_with_kernel_inject=True
    )
    assert engine.decoder is not None
    torch.save(engine.module, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    ids, _ = prompts(False)
    for again in (found, pickle.loads(pickle.dumps(engine.module)), copy.deepcopy(engine.module)):
        assert torch.equal(again(ids).logits, engine.module(ids).logits)


def test_injection_can_be_taken_back():
    model = build("gpt2")
    assert deepspeed.replace_transformer_layer(None, model) is model
    from deepspeed.module_inject.replace_module import decoder_of

    assert decoder_of(model) is not None
    deepspeed.revert_transformer_layer(None, model)
    assert decoder_of(model) is None
