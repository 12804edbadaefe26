# SPDX-License-Identifier: Apache-2.0
"""A small training run that is saved and resumed; also a program, run by this package or by another of its name.

`python checkpointing.py FOLDER STAGE DTYPE [frozen] [universal] [offload] [load=FOLDER]` trains 8 steps and saves before
the fourth (or loads there and trains on), then writes FOLDER/losses.json. `universal` loads a universal checkpoint;
`offload` keeps the optimizer on the CPU. The launcher's variables say how many ranks there are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

SAVE_AT, STEPS = 3, 8


class Net(torch.nn.Module):
    """Tied weights, a buffer, sizes that fit no shard."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 5)
        self.fc = torch.nn.Linear(5, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.register_buffer("scale", torch.full((6,), 1.5))
        self.head = torch.nn.Linear(6, 5, bias=False)
        self.out = torch.nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.fc(self.embed(x)))
        hidden = self.norm(hidden) * self.scale.to(hidden.dtype)
        return torch.nn.functional.cross_entropy(self.out(self.head(hidden)).float(), y)


def config(
    stage: int,
    dtype: str,
    zero: dict[str, Any] | None = None,
    adam: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, **(adam or {"torch_adam": True})}},
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 4},
        },
    }
    if checkpoint is not None:
        made["checkpoint"] = checkpoint
    if dtype == "bf16":
        made["bf16"] = {"enabled": True}
    if dtype == "fp16":
        made["fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}
    return made


def engine(stage: int, dtype: str, *, seed: int = 0, frozen: bool = False, **options: Any) -> Any:
    """An engine over a model whose weights come from `seed`."""
    import deepspeed

    torch.manual_seed(seed)
    model = Net()
    model.fc.weight.requires_grad_(not frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return deepspeed.initialize(
        model=model, model_parameters=groups, config=config(stage, dtype, **options)
    )[0]


def train(engine: Any, first: int, last: int, rank: int = 0, ranks: int = 1) -> list[float]:
    """Steps `first` to `last`; returns this rank's losses."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(last):
        x = torch.randint(0, 7, (8,), generator=generator)
        y = torch.randint(0, 7, (8,), generator=generator)
        if step >= first:
            loss = engine(x.chunk(ranks)[rank], y.chunk(ranks)[rank])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Weights, masters and moments by name, whole (collective)."""
    from deepspeed.utils.tensor_fragment import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
    )

    found = {}
    for param, name in engine.param_names.items():
        found[name] = param.detach().clone()
        master = safe_get_full_fp32_param(param)
        if master is None:
            states = engine.optimizer.state.get(param, {})
        else:
            found[f"{name}.master"] = master
            states = {
                key: safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")
            }
        for key, value in states.items():
            if key.startswith("exp_avg") and value is not None:
                found[f"{name}.{key}"] = value.clone()
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names under which two states differ, in any bit."""
    keys = set(first) & set(second)
    return sorted(set(first) ^ set(second)) + sorted(
        key for key in keys if not torch.equal(first[key].to(second[key].dtype), second[key])
    )


def main(arguments: list[str]) -> None:
    import deepspeed

    folder, stage, dtype = Path(arguments[0]), int(arguments[1]), arguments[2]
    source = next((a.removeprefix("load=") for a in arguments if a.startswith("load=")), None)
    deepspeed.init_distributed("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    options: dict[str, Any] = {}
    if "universal" in arguments:
        options["checkpoint"] = {"load_universal": True}
    if "offload" in arguments:
        options["zero"] = {"offload_optimizer": {"device": "cpu"}}
        options["adam"] = {"torch_adam": False}
    made = engine(stage, dtype, frozen="frozen" in arguments, **options)
    losses = [] if source else train(made, 0, SAVE_AT, rank, ranks)
    if source:
        path, _ = made.load_checkpoint(source)
        if path is None:
            raise SystemExit(f"nothing loaded from {source}")
    else:
        made.save_checkpoint(str(folder), tag="t", client_state={"mine": 5})
    losses += train(made, SAVE_AT, STEPS, rank, ranks)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
