# SPDX-License-Identifier: Apache-2.0
"""Experts of a model that AutoEP spreads train as they do on one process, and come back from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.utils import groups
from tests.helpers.expert_models import Listed, Mixture, Stacked

KINDS = {"stacked": Stacked, "listed": Listed}


def engine(stage: int, ep_size: int, kind: str = "stacked", seed: int = 3, **settings: Any) -> Any:
    groups.reset()
    torch.manual_seed(seed)
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 0.5,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True},
        },
        "zero_optimization": {"stage": stage},
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        **settings,
    }
    return deepspeed.initialize(model=Mixture(KINDS[kind]), config=config)[0]


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 3, 8, generator=generator) for _ in range(steps)]


def train(made: Any, data: list[torch.Tensor], rank: int, ranks: int) -> list[float]:
    losses = []
    for batch in data:
        loss = made(batch.chunk(ranks)[rank])
        made.backward(loss)
        made.step()
        whole = loss.detach().clone()
        torch.distributed.all_reduce(whole)
        losses.append(whole.item() / ranks)
    return losses


def plain(kind: str, data: list[torch.Tensor]) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model, losses = Mixture(KINDS[kind]), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in data:
        loss = model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def export_faults(made: Any, folder: Path, weights: dict[str, torch.Tensor]) -> list[str]:
    """Where weights that all ranks export differ from others: the names, or that there are other ones."""
    made.save_16bit_model(folder)
    torch.distributed.barrier()
    there = torch.load(folder / "pytorch_model.bin", weights_only=True)
    if sorted(there) != sorted(weights):
        return [f"names {list(there)}"]
    return [
        name
        for name, value in weights.items()
        if not torch.allclose(value, there[name], rtol=1e-4, atol=1e-5)
    ]


def walk(rank: int, ranks: int, cases: list[tuple[int, int, str]], folder: Path) -> list[str]:
    wrong, data = [], batches(4)
    for stage, ep_size, kind in cases:
        case = f"stage {stage} ep {ep_size} {kind}"
        losses, weights = plain(kind, data)
        made = engine(stage, ep_size, kind)
        # fp32 sums in another order, four steps of Adam
        if not torch.allclose(
            *map(torch.tensor, (train(made, data, rank, ranks), losses)), rtol=1e-5
        ):
            wrong.append(f"{case}: losses")
        if stage < 3:
            wrong += [f"{case}: {what}" for what in export_faults(made, folder / case, weights)]
    return wrong


def test_two_ranks_train_as_one_process_does(ranks2: Any, tmp_path: Path) -> None:
    cases = [
        (0, 2, "stacked"),
        (1, 2, "listed"),
        (2, 2, "stacked"),
        (3, 2, "listed"),
        (2, 1, "listed"),
    ]
    assert ranks2.run(walk, 2, cases, tmp_path) == [[], []]


def test_two_pairs_of_ranks_train_as_one_process_does(ranks4: Any, tmp_path: Path) -> None:
    cases = [(0, 2, "stacked"), (2, 2, "listed"), (3, 2, "stacked")]
    assert ranks4.run(walk, 4, cases, tmp_path) == [[], [], [], []]


def state_of(made: Any) -> dict[str, torch.Tensor]:
    """Masters and first moments of all parameters, experts put together; equal on all ranks."""
    found = {}
    shares = {}
    for name, layer in made.module.named_modules():
        if hasattr(layer, "ep_group_name"):
            shares.update({f"{name}.experts.{w}": layer for w in ("w1", "w2", "w3")})
    for name, param in made.module.named_parameters():
        for key in (None, "exp_avg"):
            if key is None:
                value = deepspeed.utils.safe_get_full_fp32_param(param)
                value = param.detach() if value is None else value
            else:
                value = deepspeed.utils.safe_get_full_optimizer_state(param, key)
                value = made.optimizer.state[param][key] if value is None else value
            layer = shares.get(name)
            if layer is not None and layer.ep_size > 1:
                parts = [torch.empty_like(value) for _ in range(layer.ep_size)]
                torch.distributed.all_gather(parts, value.contiguous(), group=layer.ep_group)
                value = torch.cat(parts)
            found[f"{name} {key}"] = value.clone()
    return found


def save_and_load(rank: int, folder: Path) -> list[str]:
    wrong, data = [], batches(5)
    universal = {"checkpoint": {"load_universal": True}}
    for stage in (0, 2, 3):
        place = folder / str(stage)
        made = engine(stage, 2)
        train(made, data[:2], rank, 2)
        made.save_checkpoint(place, tag="t")
        state, losses = state_of(made), train(made, data[2:], rank, 2)
        if rank == 0 and stage:
            convert(place / "t", place / "u")
        torch.distributed.barrier()
        cases: list[tuple[int, int, dict[str, Any]]] = [(stage, 2, {})]
        if stage:
            cases += [(5 - stage, 1, {}), (stage, 1, universal), (5 - stage, 2, universal)]
        for after, ep_size, settings in cases:
            case = f"{stage} -> {after} ep {ep_size} {settings}"
            other = engine(after, ep_size, seed=9 + rank, **settings)
            other.load_checkpoint(place)
            now = state_of(other)
            wrong += [f"{case}: {n}" for n in state if not torch.equal(now[n], state[n])]
            again = torch.tensor(train(other, data[2:], rank, 2))
            if not torch.allclose(again, torch.tensor(losses), rtol=1e-5):
                wrong.append(f"{case}: losses")
    return wrong


def test_spread_experts_come_back_with_another_number_of_ranks(ranks2: Any, tmp_path: Path) -> None:
    assert ranks2.run(save_and_load, tmp_path) == [[], []]
    files = {path.name for path in (tmp_path / "2" / "t").iterdir()}
    assert {f"layer_1_expert_{e}_mp_rank_00_model_states.pt" for e in range(4)} <= files
    part = torch.load(
        tmp_path / "2" / "t" / "layer_1_expert_3_mp_rank_00_model_states.pt", weights_only=True
    )
    assert {name: tuple(value.shape) for name, value in part.items()} == {
        "model.layers.1.mlp.experts.w1.3": (6, 8),
        "model.layers.1.mlp.experts.w2.3": (8, 6),
        "model.layers.1.mlp.experts.w3.3": (6, 8),
    }
    assert not any("_expert_" in path.name for path in (tmp_path / "3" / "t").iterdir())


def refusals(rank: int) -> list[str]:
    messages = []
    for settings in (
        {"expert_parallel": {"enabled": True, "autoep_size": 3}},
        {"expert_parallel": {"enabled": True, "preset_model": "no such"}},
        {"expert_parallel": {"enabled": True, "comm_backend": "other"}},
    ):
        with pytest.raises(Exception) as caught:
            engine(2, 2, **settings)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


def test_what_cannot_be_is_refused_by_name(ranks2: Any) -> None:
    size, preset, backend = ranks2.run(refusals)[0]
    assert "ValueError" in size and "Valid expert-width values: [1, 2]" in size
    assert "preset_model" in preset and "no such" in preset
    assert "comm_backend" in backend
