# SPDX-License-Identifier: Apache-2.0
"""`init_inference` over two ranks: the outputs and the tokens of a model that one process has whole."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import deepspeed
from tests.helpers.libraries import forget

transformers = pytest.importorskip("transformers", minversion="4.41")
pytest.importorskip("transformers.models.llama.modeling_llama", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
T5_ROWS = ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")


def model_of(name):
    """A model, how it is divided besides its size, and whether it generates."""
    torch.manual_seed(3)
    if name == "llama":
        config = transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config), {}, True
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config), {}, True
    if name == "opt":
        config = transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)
        return transformers.OPTForCausalLM(config), {}, True
    if name == "bert":
        from transformers.models.bert.modeling_bert import BertLayer

        config = transformers.BertConfig(**SMALL, intermediate_size=64)
        options = {"injection_policy": {BertLayer: ("output.dense",)}}
        return transformers.BertForMaskedLM(config), options, False
    from transformers.models.t5.modeling_t5 import T5Block

    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if name == "t5 by a tuple":
        return model, {"injection_policy_tuple": T5_ROWS}, True
    return model, {"injection_policy": {T5Block: T5_ROWS}}, True


def outputs_of(callee, model, generates, sampled):
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    found = [callee(input_ids=ids, **more).logits]
    if generates:
        words = {"max_new_tokens": 6, "pad_token_id": 0}
        found.append(callee.generate(input_ids=ids, do_sample=False, **words))
        torch.manual_seed(sampled)
        found.append(callee.generate(input_ids=ids, do_sample=True, **words))
    return found


@torch.no_grad()
def on_two_ranks(rank, name):
    warnings.simplefilter("ignore")
    forget()
    model, options, generates = model_of(name)
    whole = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = outputs_of(whole, whole, generates, 5)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    engine = deepspeed.init_inference(model, mp_size=2, dtype=torch.float32, **options)
    # the second rank's own random numbers are others
    found = outputs_of(engine, model, generates, 5 + rank)
    assert len(found) == len(expected)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)  # sums in two parts
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(mine, theirs)
    halves = [n for n, p in model.named_parameters() if p.numel() * 2 == sizes.get(n)]
    return len(halves)


@pytest.mark.parametrize(
    ("name", "halves"),
    [("llama", 14), ("gpt2", 12), ("opt", 20), ("bert", 20), ("t5", 34), ("t5 by a tuple", 34)],
)
def test_a_divided_model_gives_what_the_whole_one_does(ranks2, name, halves):
    for divided in ranks2.run(on_two_ranks, name):
        assert divided >= halves  # the heads of some models, too


def refused(rank, case):
    warnings.simplefilter("ignore")
    forget()
    if case == "size":
        options = {"tensor_parallel": {"tp_size": 3}}
    elif case == "policy":
        options = {"mp_size": 2, "injection_policy": {"NoSuchBlock": ("o",)}}
    elif case == "value":
        options = {"mp_size": 2, "injection_policy": {"GPT2Block": object}}
    else:
        options = {"mp_size": 2}
    model = torch.nn.Linear(4, 4) if case == "unknown" else model_of("gpt2")[0]
    try:
        engine = deepspeed.init_inference(model, dtype=torch.float32, **options)
        engine(input_ids=torch.tensor([[1, 2 + rank]]))
    except (ValueError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("size", "ValueError: the ranks cannot be put into groups"),
        ("policy", "ValueError: injection_policy divides none"),
        ("value", "ValueError: injection_policy does not say"),
        ("unknown", "ValueError: how this model's layers are divided is not known"),
        ("inputs", "AssertionError: Data inconsistency"),
    ],
)
def test_what_cannot_be_divided_is_refused_on_all_ranks(ranks2, case, words):
    for text in ranks2.run(refused, case):
        assert text.startswith(words)


def fused_and_from_files(rank, folder):
    warnings.simplefilter("ignore")
    forget()
    model = model_of("llama")[0]
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    engine = deepspeed.init_inference(
        empty,
        tensor_parallel={"tp_size": 2},
        dtype=torch.float32,
        checkpoint=folder,
        replace_with_kernel_inject=True,
    )
    assert engine.decoder is None  # the fused program is of whole layers
    ids = torch.tensor([[5, 6, 7]])
    return engine(input_ids=ids).logits.detach(), engine.module.lm_head.weight.shape


def test_weights_from_files_are_divided(ranks2, tmp_path):
    model = model_of("llama")[0].eval()
    model.save_pretrained(tmp_path)
    expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits.detach()
    for logits, _ in ranks2.run(fused_and_from_files, str(tmp_path)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def ragged(rank, name):
    from deepspeed.inference.v2 import InferenceEngineV2

    warnings.simplefilter("ignore")
    forget()
    model = model_of(name)[0].eval()
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    memory = {"mode": "allocate", "size": 3}
    engine = InferenceEngineV2(model, {"tp": {"tp_size": 2}, "manager": {"memory_config": memory}})
    engine.put([1], [ids[0, :12]])
    engine.put([1, 2], [ids[0, 12:29], ids[1, :29]])
    torch.testing.assert_close(
        engine.put([2, 1], ids[[1, 0], 29:]), expected[[1, 0]], rtol=1e-4, atol=1e-5
    )
    return engine._model.shapes[0][0].heads


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ragged_batches_on_two_ranks_give_what_the_whole_model_does(ranks2, name):
    assert ranks2.run(ragged, name) == [1 if name == "llama" else 2] * 2
