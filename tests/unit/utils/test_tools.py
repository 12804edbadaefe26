# SPDX-License-Identifier: Apache-2.0
"""OnDevice, names for messages, mpu questions, group getters in one process, profiler ranges."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from deepspeed.accelerator import cuda_accelerator
from deepspeed.comm.mesh import Axis, Mesh
from deepspeed.utils import OnDevice, debug, groups, instrument_w_nvtx, nvtx
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
)
from deepspeed.utils.errors import DeepSpeedCommError
from deepspeed.utils.exceptions import DeprecatedException


# ------------------------------------------------------------------ OnDevice
def model():
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Embedding(5, 2), torch.nn.BatchNorm1d(3)
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_are_built_in_dtype_on_device(device):
    with OnDevice(dtype=torch.float16, device=device):
        built = model()
        old_style = torch.Tensor(2, 3)
    for name, value in built.state_dict().items():
        assert value.device.type == device
        wanted = torch.int64 if name.endswith("num_batches_tracked") else torch.float16
        assert value.dtype == wanted
    assert all(param.requires_grad for param in built.parameters())
    assert (old_style.device.type, old_style.dtype) == (device, torch.float16)


def test_afterwards_everything_is_as_before():
    with pytest.raises(KeyError), OnDevice(dtype=torch.float16, device="meta"):
        raise KeyError
    assert "__new__" not in vars(torch.Tensor)
    assert torch.Tensor([1, 2]).tolist() == [1.0, 2.0]
    assert torch.nn.Linear(2, 2).weight.dtype == torch.float32


def test_a_disabled_context_does_nothing():
    with OnDevice(dtype=torch.float16, device="meta", enabled=False):
        assert torch.ones(1).dtype == torch.float32


def test_values_and_own_devices_are_kept():
    with OnDevice(dtype=torch.float64, device="cpu"):
        assert torch.tensor([1.5], dtype=torch.float32).tolist() == [1.5]
        assert torch.arange(3).dtype == torch.int64
        assert torch.ones(2, device="meta").device.type == "meta"


# ------------------------------------------------------------------ names
def test_names_are_remembered_while_their_owners_live():
    built = model()
    debug.debug_extract_module_and_param_names(built)
    assert debug.debug_param2name(built[0].weight) == "0.weight"
    assert debug.debug_module2name_class(built[2]) == "name=2 BatchNorm1d"
    assert debug.debug_param2name_id_shape(built[1].weight).endswith("shape=(5, 2)")
    assert debug.debug_param2name(torch.ones(1)) == "unknown"
    assert len(debug.param_names) == 5
    del built
    gc.collect()
    assert len(debug.param_names) == 0
    debug.debug_clear_module_and_param_names()


def test_prints_name_their_rank(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    debug.print_rank0("quiet")
    debug.print_rank0("loud", 1, force=True)
    debug.log_rank_file(3, "a", "b")
    assert capsys.readouterr().out == "[Rank -1] loud 1\n"
    assert (tmp_path / "debug_rank3.txt").read_text(encoding="utf-8") == "a\nb\n"


# ------------------------------------------------------------------ mpu
def test_an_mpu_is_asked_by_its_newest_name():
    mpu = SimpleNamespace(
        get_model_parallel_rank=lambda: 5,
        get_tensor_model_parallel_rank=lambda: 1,
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_group=lambda: "group",
    )
    assert bwc_tensor_model_parallel_rank(mpu) == 1
    assert bwc_tensor_model_parallel_world_size(mpu) == 2
    assert bwc_tensor_model_parallel_group(mpu) == "group"
    assert bwc_pipeline_parallel_world_size(mpu) == 1
    assert bwc_tensor_model_parallel_rank() == 0


# ------------------------------------------------------------------ groups, one process
@pytest.fixture(autouse=True)
def fresh_groups(monkeypatch):
    monkeypatch.setattr(groups, "mpu", None)
    groups.reset()
    yield
    groups.reset()


def test_one_process_is_every_group():
    for name in ("data", "sequence", "sequence_data", "model"):
        assert getattr(groups, f"_get_{name}_parallel_world_size")() == 1
        assert getattr(groups, f"_get_{name}_parallel_rank")() == 0
    assert groups.get_tensor_model_parallel_src_rank() == 0
    assert groups._get_data_parallel_group() is None  # there is no torch.distributed group
    groups._create_expert_and_data_parallel(1)
    assert groups._get_expert_parallel_group_dict() == {"ep_size_1": None}
    assert groups._get_expert_data_parallel_world_size("ep_size_1") == 1
    assert groups._get_max_expert_size() == 1


def test_experts_over_more_ranks_than_there_are_refuse():
    with pytest.raises(DeepSpeedCommError, match="ep_size=2"):
        groups._create_expert_and_data_parallel(2)


def test_groups_that_nobody_made_assert():
    with pytest.raises(AssertionError, match="expert parallel group is not initialized"):
        groups._get_expert_parallel_group("ep_size_4")


def test_an_mpus_answers_win(monkeypatch):
    mpu = SimpleNamespace(
        get_data_parallel_world_size=lambda: 4,
        get_data_parallel_rank=lambda: 0,
        get_model_parallel_world_size=lambda: 2,
        get_model_parallel_rank=lambda: 1,
        get_sequence_parallel_world_size=lambda: 8,
    )
    monkeypatch.setattr(groups, "mpu", mpu)
    assert groups._get_data_parallel_world_size() == 4
    assert groups._get_data_parallel_rank() == 0
    assert groups.get_model_parallel_world_size() == 2
    assert groups.get_tensor_model_parallel_rank() == 1
    assert groups._get_sequence_parallel_world_size() == 8
    assert groups._get_sequence_parallel_rank() == 0


def test_a_mesh_can_be_set():
    alone = Axis.alone()
    pair = Axis(group="pair", size=2, rank=1, ranks=(0, 1))
    groups.set_mesh(Mesh(alone, alone, pair, alone, alone, pair))
    assert groups._get_sequence_parallel_group() == "pair"
    assert groups._get_sequence_data_parallel_rank() == 1
    groups.set_tensor_model_parallel_world_size(6)
    groups.set_tensor_model_parallel_rank(3)
    assert groups.get_model_parallel_world_size() == 6
    assert groups.get_model_parallel_rank() == 3


def test_the_old_initialize_says_what_to_do():
    with pytest.raises(DeprecatedException, match="MoE layer"):
        groups.initialize(ep_size=2)


# ------------------------------------------------------------------ profiler ranges
@pytest.mark.parametrize("domains", [False, True])
def test_ranges_open_and_close_with_each_call(monkeypatch, domains):
    seen = []
    fake = SimpleNamespace(
        push_range=lambda message, category: seen.append(message), pop_range=lambda: seen.append("")
    )
    package = SimpleNamespace(get_domain={nvtx.DEEPSPEED_NVTX_DOMAIN: fake}.__getitem__)
    monkeypatch.setattr(cuda_accelerator, "nvtx", package if domains else None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: seen.append(f"torch {name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append(""))

    @instrument_w_nvtx
    def work(fail):
        if fail:
            raise KeyError
        return 3

    assert work(False) == 3  # a CPU has no profiler
    assert seen == []
    cuda = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setattr(nvtx, "get_accelerator", lambda: cuda)
    assert work(fail=False) == 3
    with pytest.raises(KeyError):
        work(True)
    assert [entry.rpartition(".")[2] for entry in seen] == ["work", "", "work", ""]
    assert domains != seen[0].startswith("torch ")
    assert work.__name__ == "work"


def test_expert_groups_of_a_job_of_any_shape():
    spread, copies = groups._get_expert_parallel_ranks(8, 1, 2, pipeline_parallel_size_=2)
    assert spread == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert copies == [[0, 2], [1, 3], [4, 6], [5, 7]]
    spread, copies = groups._get_expert_parallel_ranks(
        8, 2, 2, use_data_before_expert_parallel_=True
    )
    assert spread == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert copies == [[0, 2], [4, 6], [1, 3], [5, 7]]
