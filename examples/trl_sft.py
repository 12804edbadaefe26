# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with TRL under ZeRO: words that follow each other. No download, no GPU needed.

python examples/trl_sft.py
deepspeed --num_gpus 2 examples/trl_sft.py --stage 3
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

WORDS = [
    *("one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    names = ["<pad>", "<end>", *WORDS]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def settings(description: str | None, out: str) -> dict[str, Any]:
    """What the command line asks for, as a trainer's arguments.

    Args:
        description: what the program does.
        out: its folder, unless the command line names one.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", default=out)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    args = parser.parse_args()
    return {
        "output_dir": args.out,
        "per_device_train_batch_size": 4,
        "max_steps": args.steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": args.stage},
        },
    }


def report(trainer: Trainer) -> None:
    """Say what trained, and how the loss went."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    engine = trainer.model_wrapped
    print(f"{type(engine).__name__}, stage {engine.zero_optimization_stage()}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def main() -> None:
    arguments = SFTConfig(learning_rate=1e-2, **settings(__doc__, "out/sft"))
    words = tokenizer()
    texts = [" ".join((WORDS[i:] + WORDS[:i])[:8]) for i in range(len(WORDS))] * 4
    trainer = SFTTrainer(
        model=model(len(words)),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=words,
    )
    trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
