# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own with Accelerate and ZeRO. No download, no GPU needed.

python examples/accelerate_loop.py
accelerate launch --num_processes 2 examples/accelerate_loop.py --stage 3
"""

from __future__ import annotations

import argparse
import os

import torch

if not torch.cuda.is_available():  # accelerate looks for a GPU unless it is told
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")

from accelerate import Accelerator, DeepSpeedPlugin

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/accelerate")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stage", type=int, default=2)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        os.environ.update({**ALONE, "MASTER_PORT": "0"})
    plugin = DeepSpeedPlugin(
        zero_stage=args.stage, gradient_accumulation_steps=2, gradient_clipping=1.0
    )
    accelerator = Accelerator(gradient_accumulation_steps=2, deepspeed_plugin=plugin)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(2 * args.steps, 8)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for x, y in loader:
            with accelerator.accumulate(engine):
                loss = (engine(x) - y).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.save_state(args.out)
    print(f"{type(engine).__name__}, stage {engine.zero_optimization_stage()}")
    print(f"loss {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}")


if __name__ == "__main__":
    main()
