# SPDX-License-Identifier: Apache-2.0
"""Ragged batches: whatever the order in which tokens of sequences come, logits are those of each sequence alone."""

from __future__ import annotations

import pytest
import torch

from deepspeed.inference.v2.config_v2 import DSStateManagerConfig, RaggedInferenceEngineConfig
from deepspeed.inference.v2.ragged import BlockedAllocator
from deepspeed.inference.v2.scheduling_utils import SchedulingError, SchedulingResult
from deepspeed.utils.errors import DeepSpeedCheckpointError, DeepSpeedConfigError

transformers = pytest.importorskip("transformers", minversion="4.41")
pytest.importorskip("transformers.models.llama.modeling_llama", exc_type=ImportError)

VOCABULARY = 64
SMALL = {
    "max_tracked_sequences": 4,
    "max_ragged_sequence_count": 3,
    "max_ragged_batch_size": 100,
    "max_context": 200,
    "memory_config": {"mode": "allocate", "size": 5},
}
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_key_value_heads=2, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def mistral():
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=48, num_key_value_heads=2, sliding_window=9, **SIZES
    )
    return transformers.MistralForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def opt():
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256, **SIZES
    )
    return transformers.OPTForCausalLM(config)


MODELS = [llama, mistral, gpt2, opt]


def engine_of(model, **manager):
    from deepspeed.inference.v2 import InferenceEngineV2

    return InferenceEngineV2(model.eval(), {"manager": {**SMALL, **manager}})


def alone(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens[None]).logits[0, -1]


@pytest.mark.parametrize("make", MODELS)
def test_logits_are_those_of_each_sequence_alone(make):
    torch.manual_seed(1)
    model = make()
    engine = engine_of(model)
    given = torch.randint(0, VOCABULARY, (3, 90))
    seen = [0, 0, 0]
    # a prompt that fills a block and more, others that come later, in pieces, one token at a time, and together
    for wanted in ([70, 0, 0], [1, 3, 0], [1, 1, 20], [1, 5, 1], [1, 1, 1], [0, 7, 7]):
        uids = [uid for uid in range(3) if wanted[uid]]
        new = [given[uid, seen[uid] : seen[uid] + wanted[uid]] for uid in uids]
        logits = engine.put([uid + 7 for uid in uids], new)
        for row, uid in enumerate(uids):
            seen[uid] += wanted[uid]
            # sums of a few dozen products in fp32, in another order
            torch.testing.assert_close(
                logits[row], alone(model, given[uid, : seen[uid]]), rtol=1e-4, atol=1e-5
            )


def test_what_is_not_finite_stays_in_its_sequence():
    model = llama()
    model.get_input_embeddings().weight.data[7] = float("inf")
    engine = engine_of(model)
    engine.put([1], [torch.tensor([7])])  # the first block of the cache
    tokens = torch.tensor([3, 1, 4, 1, 5])
    engine.put([2, 3], [tokens, tokens[:2]])
    logits = engine.put([2, 3], [tokens[:1], tokens[:1]])
    for row, before in enumerate((tokens, tokens[:2])):
        expected = alone(model, torch.cat([before, tokens[:1]]))
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


def test_angles_of_long_sequences_are_not_those_of_short_ones():
    angles = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    try:
        config = transformers.Phi3Config(
            hidden_size=32,
            intermediate_size=48,
            pad_token_id=0,
            max_position_embeddings=200,
            original_max_position_embeddings=30,
            rope_scaling={"type": "longrope", **angles},
            **SIZES,
        )
    except ValueError:
        pytest.skip("this release of transformers has no LongRoPE")
    model = transformers.Phi3ForCausalLM(config)
    engine = engine_of(model)
    tokens = torch.randint(0, VOCABULARY, (40,))
    engine.put([1, 2], [tokens[:35], tokens[:5]])
    logits = engine.put([1, 2], [tokens[35:36], tokens[5:6]])
    for row, length in enumerate((36, 6)):
        torch.testing.assert_close(logits[row], alone(model, tokens[:length]), rtol=1e-4, atol=1e-5)


def test_a_model_that_keeps_something_else_is_refused():
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    with pytest.raises(ValueError, match="keeps keys and values"):
        engine_of(transformers.MambaForCausalLM(config))


def test_a_sequence_that_ends_leaves_its_blocks_to_others():
    engine = engine_of(llama())
    tokens = torch.randint(0, VOCABULARY, (100,))
    engine.put([1, 2], [tokens[:65], tokens[:35]])
    assert engine.free_blocks.tolist() == [2]
    assert engine.get_remaining_block_capacity(1) == 63
    engine.flush(1)
    assert engine.free_blocks.tolist() == [4]
    first = engine.put([3], [tokens])
    engine.flush(3)
    engine.flush(2)
    torch.testing.assert_close(engine.put([1], [tokens]), first)
    assert engine.free_blocks.tolist() == [3]


def test_limits_are_told_before_and_raised_with_nothing_changed():
    engine = engine_of(llama())
    tokens = torch.randint(0, VOCABULARY, (100,))
    engine.put([1], [tokens])
    asked = {
        ((1, 2, 3, 4), (1, 1, 1, 1)): SchedulingResult.BatchSequenceLimitExceeded,
        ((1,), (101,)): SchedulingResult.SequenceTokenLimitExceeded,
        ((1, 2), (50, 51)): SchedulingResult.BatchTokenLimitExceeded,
        ((2, 3), (65, 35)): SchedulingResult.Success,
    }
    for (uids, lengths), result in asked.items():
        assert engine.can_schedule(uids, lengths) is result
        if result is not SchedulingResult.Success:
            with pytest.raises(SchedulingError, match=result.name):
                engine.put(uids, [tokens.repeat(2)[:length] for length in lengths])
    engine.put([2, 3], [tokens[:65], tokens[:35]])
    assert engine.can_schedule([4], [1]) is SchedulingResult.KVCacheLimitExceeded
    with pytest.raises(ValueError, match="free blocks"):
        engine.put([3, 4], [tokens[:30], tokens[:1]], do_checks=False)
    assert engine._state_manager.n_tracked_sequences == 3
    assert engine.free_blocks.tolist() == [0]
    assert engine.query(3, 50, engine.free_blocks)[0] == 29
    assert engine.query(3, 10, engine.free_blocks)[0] == 10
    assert engine.query(9, 70, 1) == (64, torch.tensor([1], dtype=torch.int32))


def test_an_error_in_the_model_leaves_the_sequences_as_they_were(monkeypatch):
    model = llama()
    engine = engine_of(model)
    tokens = torch.randint(0, VOCABULARY, (80,))
    engine.put([1], [tokens[:60]])

    def fails(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_run_equal", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.put([1, 2], [tokens[60:], tokens])
    assert engine.free_blocks.tolist() == [4]
    logits = engine.put([1], [tokens[60:]])
    torch.testing.assert_close(logits[0], alone(model, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("uids", "tokens"), [([1, 1], [[1], [2]]), ([1], [[]]), ([1, 2], [[1]])])
def test_batches_that_are_none_are_refused(uids, tokens):
    engine = engine_of(llama())
    with pytest.raises(ValueError, match="different sequences"):
        engine.put(uids, [torch.tensor(each) for each in tokens])


def test_what_is_saved_can_be_served_again(tmp_path):
    from deepspeed.inference.v2 import build_engine_from_ds_checkpoint, build_hf_engine

    model, tokens = llama().to(torch.bfloat16), torch.randint(0, VOCABULARY, (9,))
    engine = engine_of(model)
    engine.serialize(tmp_path / "saved model")
    for build in (build_hf_engine, build_engine_from_ds_checkpoint):
        again = build(tmp_path / "saved model", RaggedInferenceEngineConfig(manager=SMALL))
        assert torch.equal(again.put([5], [tokens]), engine.put([5], [tokens]))
        assert again._model.dtype is torch.bfloat16
        engine.flush(5)
    with pytest.raises(DeepSpeedCheckpointError, match="no saved engine"):
        build_engine_from_ds_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "asked", [{"manager": {"offload": True}}, {"quantization": {"quantization_mode": "wf6af16"}}]
)
def test_what_is_not_built_is_refused_by_name(asked):
    from deepspeed.inference.v2 import InferenceEngineV2

    with pytest.raises(DeepSpeedConfigError, match=next(iter(next(iter(asked.values()))))):
        InferenceEngineV2(llama(), asked)


@pytest.mark.parametrize(
    "wrong", [{"max_tracked_sequences": 0}, {"max_context": -1}, {"max_ragged_batch_size": 100}]
)
def test_limits_that_cannot_hold_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DSStateManagerConfig(**wrong)


def test_blocks_are_given_once_and_taken_back_once():
    allocator = BlockedAllocator(8)
    a, b = allocator.allocate(5), allocator.allocate(3)
    assert sorted(torch.cat([a, b]).tolist()) == list(range(8))
    for wrong in (torch.tensor([8]), [-1], torch.cat([a[:1], a[:1]])):
        with pytest.raises(ValueError, match="given back once"):
            allocator.free(wrong)
    allocator.free(a[1:])
    with pytest.raises(ValueError, match="free blocks"):
        allocator.allocate(5)
    assert allocator.free_blocks == 4
