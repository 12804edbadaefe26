# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks are saved by their global numbers and come back on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.ds_to_universal import convert
from deepspeed.checkpoint.model_states import expert_renumbered
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.helpers.checkpointing import state_of

EXPERTS, WIDTH = 4, 6


class Mixture(torch.nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.moe = deepspeed.moe.layer.MoE(
            WIDTH,
            torch.nn.Linear(WIDTH, WIDTH),
            num_experts=EXPERTS,
            ep_size=ep_size,
            use_rts=False,
            drop_tokens=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, loss, _ = self.moe(self.first(x))
        return x.float().square().mean() + 0.01 * loss


def engine(
    stage: int, dtype: str, seed: int, ep_size: int, frozen: bool = False, **settings: Any
) -> Any:
    groups.reset()
    torch.manual_seed(seed)
    model = Mixture(ep_size)
    for expert in model.moe.deepspeed_moe.experts.deepspeed_experts:
        expert.bias.requires_grad_(not frozen)
    params = split_params_into_different_moe_groups_for_optimizer(
        {"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}
    )
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        **settings,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True, **config.get(dtype, {})}
    return deepspeed.initialize(model=model, model_parameters=params, config=config)[0]


def train(made: Any, first: int, last: int, rank: int, ranks: int) -> list[float]:
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(last):
        x = torch.randn(8, WIDTH, generator=generator).to(made.module.first.weight.dtype)
        if step >= first:
            loss = made(x.chunk(ranks)[rank])
            made.backward(loss)
            made.step()
            losses.append(loss.item())
    return losses


def first_of(made: Any) -> int:
    """The global number of a rank's first expert."""
    layer = made.module.moe
    axis = made.mesh.expert.get(layer.expert_group_name)
    return 0 if axis is None else axis.rank * layer.num_local_experts


def state_by_global_name(made: Any) -> dict[str, torch.Tensor]:
    first = first_of(made)
    found = {}
    for name, value in state_of(made).items():
        found[expert_renumbered(name, lambda layer: first)] = value
    return found


def walk(rank: int, folder: Path) -> list[str]:
    """Save with two ranks that share the experts; load there, and with all experts on each rank."""
    wrong = []
    for stage, dtype in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32")):
        place = folder / f"{stage}_{dtype}"
        made = engine(stage, dtype, rank, 2)
        train(made, 0, 3, rank, 2)
        made.save_checkpoint(place, tag="t")
        state, losses = state_by_global_name(made), train(made, 3, 6, rank, 2)
        if rank == 0 and stage:
            convert(place / "t", place / "u")
        torch.distributed.barrier()
        cases = [(stage, 2, {})]
        if stage:
            universal = {"checkpoint": {"load_universal": True}}
            cases += [(3 - stage, 2, {}), (stage, 1, {}), (2, 1, universal), (stage, 2, universal)]
        for after, ep_size, settings in cases:
            other = engine(after, dtype, 9 + rank, ep_size, **settings)
            other.load_checkpoint(place)
            now = state_by_global_name(other)
            case = f"{stage} {dtype} -> {after} with ep_size {ep_size} {settings}"
            # rank 1 of an unspread run holds rank 1's experts too
            wrong += [f"{case}: {n}" for n in state if not torch.equal(now[n], state[n])]
            if ep_size == 2 and train(other, 3, 6, rank, 2) != losses:
                wrong.append(f"{case}: losses")
    return wrong


def test_spread_experts_come_back(ranks2: Any, tmp_path: Path) -> None:
    assert ranks2.run(walk, tmp_path, timeout=180) == [[], []]
    names = {p.name for p in (tmp_path / "0_fp32" / "t").iterdir()}
    experts = {f"layer_0_expert_{e}_mp_rank_00_model_states.pt" for e in range(EXPERTS)}
    assert experts | {f"expp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)} <= names
    weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "2_fp32")
    for expert in range(EXPERTS):
        name = f"moe.deepspeed_moe.experts.deepspeed_experts.{expert}.weight"
        file = tmp_path / "2_fp32" / "t" / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt"
        assert torch.equal(weights[name], torch.load(file, weights_only=True)[name])


def cut_and_back(rank: int, folder: Path) -> None:
    made = engine(3, "bf16", rank, 1)
    train(made, 0, 3, rank, 2)
    made.save_checkpoint(folder, tag="t")
    state, losses = state_of(made), train(made, 3, 6, rank, 2)
    for stage in (3, 2):
        other = engine(stage, "bf16", 9, 1)
        other.load_checkpoint(folder, tag="t")
        now = state_of(other)
        assert now.keys() == state.keys()
        # between passes stage 3 has no whole weights
        masters = {name: value for name, value in state.items() if value.numel()}
        assert len(masters) >= 3 * len(list(other.module.parameters()))
        assert all(torch.equal(now[name], value) for name, value in masters.items())
        assert stage < 3 or train(other, 3, 6, rank, 2) == losses


def test_experts_that_stage_3_cuts_come_back(ranks2: Any, tmp_path: Path) -> None:
    ranks2.run(cut_and_back, tmp_path)
    assert not list((tmp_path / "t").glob("*expert*"))
    weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert sum("deepspeed_experts" in name for name in weights) == 2 * EXPERTS


def frozen_biases(made: Any) -> dict[int, torch.Tensor]:
    """The frozen weights of this rank's experts, by their global number."""
    biases = [expert.bias for expert in made.module.moe.deepspeed_moe.experts.deepspeed_experts]
    with deepspeed.zero.GatheredParameters(biases):
        return {at: bias.detach().clone() for at, bias in enumerate(biases, first_of(made))}


def frozen_and_back(rank: int, folder: Path) -> None:
    universal = {"checkpoint": {"load_universal": True}}
    for stage, spread in ((2, 2), (3, 1)):
        place = folder / str(stage)
        made = engine(stage, "fp32", rank, spread, frozen=True)
        train(made, 0, 2, rank, 2)
        made.save_checkpoint(place, tag="t")
        parts = [None, None]
        torch.distributed.all_gather_object(parts, frozen_biases(made))
        want = {number: bias for part in parts for number, bias in part.items()}
        assert sorted(want) == list(range(EXPERTS))
        if rank == 0:
            convert(place / "t", place / "u")
        torch.distributed.barrier()
        for after, ep_size in ((2, 2), (1, 1), (3, 1)):
            for tag, settings in (("t", {}), ("u", universal)):
                other = engine(after, "fp32", 9, ep_size, frozen=True, **settings)
                other.load_checkpoint(place, tag=tag)
                for number, bias in frozen_biases(other).items():
                    case = stage, after, tag, number
                    assert torch.equal(bias, want[number]), case


def test_frozen_weights_of_experts_come_back(ranks2: Any, tmp_path: Path) -> None:
    ranks2.run(frozen_and_back, tmp_path, timeout=120)
    held = [torch.load(p, weights_only=True) for p in (tmp_path / "2" / "u").glob("*_expert_*")]
    assert len(held) == EXPERTS
    assert all(name.endswith("bias") for file in held for name in file)


def refused(rank: int, folder: Path) -> str:
    made = engine(3, "fp32", 0, 2)
    with pytest.raises(NotImplementedError, match="ZeRO stage 3"):
        made.save_checkpoint(folder)
    return "refused"


def test_spread_experts_at_stage_3_are_refused_by_name(ranks2: Any, tmp_path: Path) -> None:
    assert ranks2.run(refused, tmp_path) == ["refused", "refused"]


def norms(rank: int, stage: int, dtype: str, factor: float) -> tuple[Any, ...]:
    small = {"fp16": {"initial_scale_power": 4}} if dtype == "fp16" else {}
    made = engine(stage, dtype, 3, 2, gradient_clipping=0.01, **small)
    before = made.module.first.weight.detach().clone()
    experts = [p for p in made.module.parameters() if not getattr(p, "allreduce", True)]
    if rank == 1:
        experts[0].register_hook(lambda grad: grad * factor)
    x = torch.ones(4, WIDTH, dtype=before.dtype) * torch.arange(4).view(4, 1) - rank
    made.backward(made(x))
    own = [0.0, 0.0]
    for param in made.module.parameters():
        gradient = safe_get_full_grad(param)
        own[param in set(experts)] += gradient.double().square().sum().item()
    try:
        made.step()
        said = None
    except FloatingPointError as error:
        said = str(error)
    kept = torch.equal(before, made.module.first.weight)
    none = all(p.grad is None for p in made.module.parameters())
    return made.get_global_grad_norm(), own, kept and none, said


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_with_different_experts_clip_by_one_norm(stage: int, ranks2: Any) -> None:
    results = ranks2.run(norms, stage, "fp32", 3.0)
    (dense, first), (again, second) = (own for _, own, *_ in results)
    assert dense == pytest.approx(again) and first != pytest.approx(second)
    want = (dense + first + second) ** 0.5
    assert [float(norm) for norm, *_ in results] == [pytest.approx(want, rel=1e-6)] * 2


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (0, "fp16"), (2, "fp16")])
def test_one_experts_overflow_is_that_of_all_ranks(stage: int, dtype: str, ranks2: Any) -> None:
    for _, _, kept, said in ranks2.run(norms, stage, dtype, float("inf")):
        assert kept and (dtype != "fp32" or "not finite" in said)


def gradients(rank: int) -> None:
    """Whether an expert is on one rank or on all, its gradient is the average over all samples."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(64, WIDTH, generator=generator)
    for stage in (0, 1, 2):
        found = []
        for ep_size, first in ((1, 1 + 2 * rank), (2, 1)):
            made = engine(stage, "fp32", 3, ep_size)
            made.backward(made(x))
            experts = made.module.moe.deepspeed_moe.experts.deepspeed_experts
            grads = [safe_get_full_grad(m.weight).clone() for m in (made.module.first, *experts)]
            found.append([grads[0], *grads[first : first + 2]])  # those of the same experts
            made.destroy()
        for want, got in zip(*found, strict=True):
            assert want.abs().max() > 1e-4
            # the same products, added up in another order
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_experts_gradients_do_not_depend_on_how_they_are_spread(ranks2: Any) -> None:
    ranks2.run(gradients)
