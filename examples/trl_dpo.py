# SPDX-License-Identifier: Apache-2.0
"""Preferences with TRL's DPO under ZeRO, with a reference model beside the trained one. No download, no GPU needed.

python examples/trl_dpo.py
deepspeed --num_gpus 2 examples/trl_dpo.py --stage 3
"""

from __future__ import annotations

import trl_sft
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def main() -> None:
    arguments = DPOConfig(learning_rate=5e-3, **trl_sft.settings(__doc__, "out/dpo"))
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
    trl_sft.report(trainer)


if __name__ == "__main__":
    main()
