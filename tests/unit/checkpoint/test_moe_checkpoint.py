# SPDX-License-Identifier: Apache-2.0
"""Every expert of a mixture has a file of its own, numbered over all ranks, and comes back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.model_states import local_expert_state, split_experts
from deepspeed.checkpoint.reader import load_file
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from tests.helpers.checkpointing import same, state_of
from tests.helpers.plain import check_plain


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.moe = deepspeed.moe.layer.MoE(
            6, torch.nn.Linear(6, 6), num_experts=3, use_residual=True
        )
        self.more = torch.nn.ModuleList(
            [deepspeed.moe.layer.MoE(6, torch.nn.Linear(6, 6), num_experts=2)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, loss, _ = self.moe(self.first(x))
        x, other, _ = self.more[0](x)
        return x.float().square().mean() + 0.01 * (loss + other)


def engine(stage: int, dtype: str, seed: int, frozen: str | None = None) -> Any:
    torch.manual_seed(seed)
    deepspeed.init_distributed("gloo")
    model = Mixture()
    for name, param in model.named_parameters():
        param.requires_grad_(frozen is None or not name.endswith(frozen))
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]


def train(made: Any, steps: int) -> list[float]:
    torch.manual_seed(7)  # gates drop tokens at random
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator).to(made.module.first.weight.dtype)
        loss = made(x)
        made.backward(loss)
        made.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts_are_saved_apart_and_resumed(stage: int, dtype: str, tmp_path: Path) -> None:
    first = engine(stage, dtype, seed=0)
    train(first, 3)
    first.save_checkpoint(tmp_path, tag="t")
    at_save = state_of(first)
    names = {p.name for p in (tmp_path / "t").iterdir()} - {"manifest.json"}
    experts = {f"layer_0_expert_{e}_mp_rank_00_model_states.pt" for e in range(3)}
    experts |= {f"layer_1_expert_{e}_mp_rank_00_model_states.pt" for e in range(2)}
    prefix = "bf16_" if dtype == "bf16" else ""
    rest = (
        {f"{prefix}zero_pp_rank_0_mp_rank_00_optim_states.pt"}
        if stage
        else {"expp_rank_0_mp_rank_00_optim_states.pt"}
    )
    assert names == {"mp_rank_00_model_states.pt"} | experts | rest
    for name in names:
        check_plain(tmp_path / "t" / name)
    model = load_file(tmp_path / "t" / "mp_rank_00_model_states.pt")
    assert model["num_experts"] == [3, 2]
    assert not [key for key in model["module"] if "deepspeed_experts" in key]
    assert [key for key in model["module"] if "gate.wg.weight" in key and key.startswith("moe.")]
    part = load_file(tmp_path / "t" / "layer_0_expert_2_mp_rank_00_model_states.pt")
    base = "moe.deepspeed_moe.experts.deepspeed_experts.2."
    assert set(part) == {f"{base}weight", f"{base}bias"}
    second = engine(stage, dtype, seed=9)
    second.load_checkpoint(tmp_path)
    assert same(state_of(second), at_save) == []
    assert train(second, 2) == train(first, 2)


@pytest.mark.parametrize("stage", [0, 2])
def test_frozen_parts_of_experts_can_be_left_out(stage: int, tmp_path: Path) -> None:
    made = engine(stage, "fp32", seed=0, frozen="deepspeed_experts.0.weight")
    for tag, excluded in (("all", False), ("trained", True)):
        made.save_checkpoint(tmp_path, tag=tag, exclude_frozen_parameters=excluded)
    name = "layer_0_expert_0_mp_rank_00_model_states.pt"
    base = "moe.deepspeed_moe.experts.deepspeed_experts.0."
    assert set(load_file(tmp_path / "all" / name)) == {f"{base}weight", f"{base}bias"}
    assert set(load_file(tmp_path / "trained" / name)) == {f"{base}bias"}


def test_experts_are_numbered_over_all_ranks() -> None:
    state = {
        "a.deepspeed_moe.experts.deepspeed_experts.0.w": 1,
        "a.deepspeed_moe.experts.deepspeed_experts.1.w": 2,
        "a.deepspeed_moe.gate.wg.weight": 3,
    }
    rest, experts = split_experts(state, ["a"], lambda layer: 4)
    assert rest == {"a.deepspeed_moe.gate.wg.weight": 3}
    assert experts == {
        (0, 4): {"a.deepspeed_moe.experts.deepspeed_experts.4.w": 1},
        (0, 5): {"a.deepspeed_moe.experts.deepspeed_experts.5.w": 2},
    }
    assert local_expert_state(experts[0, 5], lambda layer: 4) == {
        "a.deepspeed_moe.experts.deepspeed_experts.1.w": 2
    }
