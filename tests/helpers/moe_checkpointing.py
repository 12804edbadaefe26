# SPDX-License-Identifier: Apache-2.0
"""A small mixture of experts that is trained, saved and resumed; run by this package or by another of its name.

`python moe_checkpointing.py FOLDER STAGE DTYPE [load=FOLDER]`, as helpers/checkpointing.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

SAVE_AT, STEPS, WIDTH = 3, 8, 6


def engine(stage: int, dtype: str, seed: int) -> Any:
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(WIDTH, WIDTH)
            expert = torch.nn.Linear(WIDTH, WIDTH)
            self.moe = deepspeed.moe.layer.MoE(
                WIDTH, expert, num_experts=4, use_rts=False, drop_tokens=False
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, loss, _ = self.moe(self.first(x))
            return x.float().square().mean() + 0.01 * loss

    torch.manual_seed(seed)
    model = Mixture()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def main(arguments: list[str]) -> None:
    import deepspeed

    folder, stage, dtype = Path(arguments[0]), int(arguments[1]), arguments[2]
    source = next((a.removeprefix("load=") for a in arguments if a.startswith("load=")), None)
    deepspeed.init_distributed("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    made = engine(stage, dtype, 9 if source else 0)
    if source and made.load_checkpoint(source)[0] is None:
        raise SystemExit(f"nothing loaded from {source}")
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(STEPS):
        x = torch.randn(8, WIDTH, generator=generator).to(made.module.first.weight.dtype)
        if step == SAVE_AT and not source:
            made.save_checkpoint(str(folder), tag="t")
        if step >= SAVE_AT or not source:
            loss = made(x.chunk(ranks)[rank])
            made.backward(loss)
            made.step()
            losses.append(loss.item())
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
