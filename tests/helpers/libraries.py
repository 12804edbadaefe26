# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks of other training libraries share: their model, and no memory of the last run."""

from __future__ import annotations

import sys

import torch

VOCABULARY = 32


def forget() -> None:
    """Drop what accelerate and transformers keep of a run in their modules."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def llama() -> torch.nn.Module:
    """Two layers with tied weights; the same each time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)
