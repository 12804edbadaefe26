# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of PEFT under ZeRO, in a loop of one's own. No download, no GPU needed.

python examples/peft_lora.py
deepspeed --num_gpus 2 examples/peft_lora.py --stage 3
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import deepspeed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/peft")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    base = GPT2LMHeadModel(config)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], modules_to_save=["wte", "lm_head"])
    model = get_peft_model(base, lora)
    trainable = [param for param in model.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        config={
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": args.stage},
        },
    )
    losses = []
    for step in range(args.steps):
        starts = torch.arange(8)[:, None] + 8 * step
        rows = ((starts + torch.arange(12)) % 32).to(engine.device)
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint(args.out, exclude_frozen_parameters=True)
    print(f"{type(engine).__name__}, stage {engine.zero_optimization_stage()}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
