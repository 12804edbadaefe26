# SPDX-License-Identifier: Apache-2.0
"""Weights in one file, and what else a save leaves beside the shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import deepspeed
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.helpers.checkpointing import engine


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_are_saved_as_one_file(stage: int, tmp_path: Path) -> None:
    made = engine(stage, "bf16", frozen=True)
    assert made.save_16bit_model(tmp_path / "out") is True
    saved = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert list(saved) == list(made.module.state_dict())
    assert saved["head.weight"].dtype == torch.bfloat16
    assert saved["out.weight"].data_ptr() == saved["embed.weight"].data_ptr()
    assert torch.equal(saved["fc.weight"], made.module.fc.weight)
    made.save_16bit_model(tmp_path / "out", "trained.bin", exclude_frozen_parameters=True)
    assert "fc.weight" not in torch.load(tmp_path / "out" / "trained.bin", weights_only=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "pytorch_model.bin",
        "trained.bin",
    ]


def test_state_dicts_take_torchs_arguments(tmp_path: Path) -> None:
    made = engine(1, "fp32", frozen=True)
    assert "m.fc.weight" in made.module_state_dict(prefix="m.")
    assert "m.fc.weight" not in made.module_state_dict(prefix="m.", exclude_frozen_parameters=True)
    assert made.module_state_dict(keep_vars=True)["head.weight"].requires_grad
    weights = {name: torch.zeros_like(value) for name, value in made.module.state_dict().items()}
    made.load_module_state_dict({"module": weights})
    assert not made.module.head.weight.any()
    del weights["scale"]
    made.load_module_state_dict({"module": weights}, allowed_missing_keys=["scale"])
    with pytest.raises(RuntimeError, match="scale"):
        made.load_module_state_dict({"module": weights})


def test_the_script_beside_a_checkpoint_is_executable(tmp_path: Path) -> None:
    engine(1, "fp32").save_checkpoint(tmp_path)
    if os.name != "nt":
        assert os.access(tmp_path / "zero_to_fp32.py", os.X_OK)


def test_consolidated_weights_are_the_modules() -> None:
    made = engine(2, "bf16", frozen=True)
    whole = made._consolidated_16bit_state_dict()
    assert list(whole) == list(made.module.state_dict())
    assert whole["head.weight"].dtype == torch.bfloat16
    assert "fc.weight" not in made._consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    with pytest.raises(ValueError, match="requires ZeRO-3"):
        made._zero3_consolidated_16bit_state_dict()


def test_stage_3_refuses_the_elastic_form_and_others_take_the_key(tmp_path: Path) -> None:
    elastic = {"zero": {"elastic_checkpoint": True}}
    with pytest.raises(NotImplementedError, match="elastic"):
        engine(3, "fp32", **elastic).save_checkpoint(tmp_path)
    assert engine(2, "fp32", **elastic).save_checkpoint(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no permissions to set")
def test_a_share_without_permissions_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, mode: int) -> None:
        raise PermissionError("injected")

    monkeypatch.setattr(Path, "chmod", refuse)
    engine(1, "fp32").save_checkpoint(tmp_path)
    assert (tmp_path / "zero_to_fp32.py").is_file()


def test_masters_of_stage_0_have_the_names_of_their_files() -> None:
    made = engine(0, "fp16")
    groups = [[part.master for part in group.parts] for group in made.optimizer.groups]
    own = getattr(made.optimizer, "fp32_groups_flat", None) or made.optimizer.fp32_groups
    for masters, given in zip(groups, own, strict=True):
        flat = given if torch.is_tensor(given) else torch.cat([part.reshape(-1) for part in given])
        assert torch.equal(flat, torch.cat(masters)[: flat.numel()])
    name = made._get_optimizer_ckpt_name("dir", "tag", 0)
    assert name == os.path.join("dir", "tag", "expp_rank_0_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_without_elements_are_saved_and_loaded(stage: int, tmp_path: Path) -> None:
    def made(seed: int) -> deepspeed.DeepSpeedEngine:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        # as a tensor-parallel rank without heads has them
        model[1].weight = torch.nn.Parameter(torch.empty(0, 4))
        model[1].bias = torch.nn.Parameter(torch.empty(0))
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        return deepspeed.initialize(model=model, config=config)[0]

    first, second = made(1), made(2)
    hidden = first.module[0](torch.ones(2, 3))
    assert first(torch.ones(2, 3)).shape == (2, 0) and hidden.shape == (2, 4)
    first.save_checkpoint(tmp_path, tag="t")
    second.load_checkpoint(tmp_path, tag="t")
    torch.testing.assert_close(second.module[0](torch.ones(2, 3)), hidden, rtol=0, atol=0)
    if stage:
        whole = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), "t")
        assert whole["1.weight"].shape == (0, 4) and whole["0.weight"].shape == (4, 3)
