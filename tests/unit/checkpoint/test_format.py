# SPDX-License-Identifier: Apache-2.0
"""Names of files and keys, letter by letter, and which tags are legal."""

from __future__ import annotations

import pytest

from deepspeed import checkpoint
from deepspeed.checkpoint import constants, format
from deepspeed.utils import zero_to_fp32


def test_file_names_are_those_of_the_format() -> None:
    assert format.model_file() == "mp_rank_00_model_states.pt"
    assert format.model_file(12) == "mp_rank_12_model_states.pt"
    assert format.zero3_model_file(10, 1) == "zero_pp_rank_10_mp_rank_01_model_states.pt"
    assert format.optim_file(3) == "zero_pp_rank_3_mp_rank_00_optim_states.pt"
    assert format.optim_file(3, 2, bf16=True) == "bf16_zero_pp_rank_3_mp_rank_02_optim_states.pt"
    assert format.expert_file(4, 17) == "layer_4_expert_17_mp_rank_00_model_states.pt"
    assert format.old_expert_file(17) == "expert_17_mp_rank_00_model_states.pt"
    assert format.expert_of(format.expert_file(4, 17)) == 17
    assert format.expert_of(format.old_expert_file(17)) == 17
    assert format.expert_of(format.expert_optim_file(0)) is None
    assert format.expert_optim_file(0) == "expp_rank_0_mp_rank_00_optim_states.pt"


def test_shards_are_looked_for_in_this_precision_first_and_then_in_all_spellings() -> None:
    assert format.optim_file_candidates(1, bf16=True) == (
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00optim_states.pt",
        "zero_pp_rank_1_mp_rank_00optim_states.pt",
    )


def test_every_name_the_format_makes_is_known_as_its_own() -> None:
    made = [
        format.model_file(),
        format.zero3_model_file(11, 3),
        format.optim_file(0),
        format.optim_file(0, bf16=True),
        format.expert_file(0, 1),
        format.old_expert_file(2),
        format.expert_optim_file(0),
        "layer_03-model_00-model_states.pt",
        format.MANIFEST,
    ]
    assert all(map(format.is_own_file, made))
    assert not any(
        map(format.is_own_file, ["pytorch_model.bin", "scheduler.pt", "rng_state_0.pth"])
    )


def test_the_stand_alone_exporter_spells_the_same_names() -> None:
    ours = {
        "LATEST": format.LATEST,
        "MANIFEST": format.MANIFEST,
        "PARTIAL_MARK": format.PARTIAL_MARK,
        "REPLACED_MARK": format.REPLACED_MARK,
        "REPLACED_SUFFIX": format.REPLACED_SUFFIX,
        "GROUP_PADDINGS": format.Zero.GROUP_PADDINGS,
        "PARAM_PADDINGS": format.Zero.PARAM_PADDINGS,
        "MODULE": format.Model.MODULE,
        "DS_CONFIG": format.Model.DS_CONFIG,
        "DATA_BEFORE_EXPERT": format.DATA_BEFORE_EXPERT,
    }
    shared = [n for n in vars(zero_to_fp32) if n.isupper() and not n.startswith("_")]
    assert len(shared) >= 15
    for name in set(shared) - {"ALIGNMENT"}:
        assert getattr(zero_to_fp32, name) == ours.get(name, getattr(constants, name, None)), name


def test_scripts_beside_older_checkpoints_find_the_names_they_import() -> None:
    wanted = """DS_VERSION OPTIMIZER_STATE_DICT SINGLE_PARTITION_OF_FP32_GROUPS FP32_FLAT_GROUPS ZERO_STAGE
        PARTITION_COUNT PARAM_SHAPES BUFFER_NAMES FROZEN_PARAM_SHAPES FROZEN_PARAM_FRAGMENTS AUTOEP_LAYERS_KEY
        AUTOEP_LAYERS_KEY_LEGACY"""
    values = {name: getattr(constants, name) for name in wanted.split()}
    assert values["SINGLE_PARTITION_OF_FP32_GROUPS"] == "single_partition_of_fp32_groups"
    assert values["FROZEN_PARAM_FRAGMENTS"] == "frozen_param_fragments"


def test_the_package_has_every_constant() -> None:
    for name in (name for name in vars(constants) if name.isupper()):
        assert getattr(checkpoint, name) == getattr(constants, name)


@pytest.mark.parametrize(
    "tag",
    [
        "global_step10",
        "checkpoint",
        "pytorch_model_0",
        "best.loss=0.5",
        "a/b",
        "epoch 3",
        "v1.2",
        "é",
    ],
)
def test_ordinary_tags_are_legal(tag: str) -> None:
    assert format.tag_problem(tag) is None


@pytest.mark.parametrize(
    "tag",
    [
        "", " ", ".", "..", "../x", "a/../../b", "a\\..\\b", "/etc", "\\\\host\\share", "C:\\x", "C:x", "a//b", "a/",
        "x\0y", "x\ny", "a:b", 'a"b', "a|b", "a?b", "a*b", "a<b", "nul", "COM1.txt", "x.", "x ", "latest",
        "latest_universal", "zero_to_fp32.py", "step.tmp", "step.old",
    ],
)  # fmt: skip
def test_tags_that_leave_the_folder_or_cannot_be_one_are_refused(tag: str) -> None:
    assert format.tag_problem(tag)


def test_rank_ten_sorts_after_rank_nine() -> None:
    names = [format.optim_file(rank) for rank in (10, 9, 1)]
    assert sorted(names, key=format.natural_key) == [format.optim_file(r) for r in (1, 9, 10)]
