# SPDX-License-Identifier: Apache-2.0
"""Preferences with TRL's DPO under ZeRO, with a reference model beside the trained one. No download, no GPU needed.

python examples/trl_dpo.py
deepspeed --num_gpus 2 examples/trl_dpo.py --stage 3
"""

from __future__ import annotations

import argparse

import torch
import trl_sft
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/dpo")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    args = parser.parse_args()
    arguments = DPOConfig(
        output_dir=args.out,
        per_device_train_batch_size=4,
        max_steps=args.steps,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": args.stage},
        },
    )
    tokenizer, words = trl_sft.tokenizer(), trl_sft.WORDS
    pairs = zip(words, words[1:], reversed(words), strict=False)
    rows = [{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in pairs] * 4
    trainer = DPOTrainer(
        model=trl_sft.model(len(tokenizer)),
        ref_model=trl_sft.model(len(tokenizer)),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    engine = trainer.model_wrapped
    print(f"{type(engine).__name__}, stage {engine.zero_optimization_stage()}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
