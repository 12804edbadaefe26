# SPDX-License-Identifier: Apache-2.0
"""Every public name of the communication package, with the arguments that scripts pass."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest

import deepspeed.comm as dist
from deepspeed.comm import rendezvous
from deepspeed.utils import env
from deepspeed.utils.errors import DeepSpeedCommError

SIGNATURES = {
    "configure": "deepspeed_config enabled prof_all prof_ops verbose debug",
    "is_initialized": "",
    "destroy_process_group": "group",
    "new_group": "ranks",
    "is_available": "",
    "broadcast": "tensor src group async_op",
    "broadcast_object_list": "object_list src group device",
    "all_gather": "tensor_list tensor group async_op",
    "all_gather_object": "object_list obj group",
    "has_reduce_scatter_tensor": "",
    "reduce_scatter_fn": "output_tensor tensor op group async_op",
    "reduce_scatter_tensor": "output_tensor tensor op group async_op",
    "all_gather_into_tensor": "output_tensor tensor group async_op",
    "has_all_gather_into_tensor": "",
    "allgather_fn": "output_tensor input_tensor group async_op",
    "all_to_all_single": "output tensor output_split_sizes input_split_sizes group async_op",
    "all_to_all": "output_tensor_list input_tensor_list group async_op",
    "send": "tensor dst group tag",
    "recv": "tensor src group tag",
    "isend": "tensor dst group tag",
    "irecv": "tensor src group tag",
    "gather": "tensor gather_list dst group async_op",
    "scatter": "tensor scatter_list src group async_op",
    "barrier": "group async_op device_ids",
    "monitored_barrier": "group timeout wait_all_ranks",
    "log_summary": "show_straggler return_dict",
    "reset_log": "",
    "has_comm_data": "",
    "get_comm_operation_count": "",
    "get_logged_comm_ops": "",
    "reduce": "tensor dst op group async_op",
    "reduce_scatter": "output input_list op group async_op",
    "has_all_reduce_coalesced": "",
    "has_coalescing_manager": "",
    "all_gather_coalesced": "output_tensors input_tensors group async_op",
    "all_reduce": "tensor op group async_op",
    "inference_all_reduce": "tensor op group async_op",
    "all_reduce_coalesced": "tensors op group async_op",
    "get_world_group": "",
    "get_world_size": "group",
    "get_rank": "group",
    "get_local_rank": "",
    "get_global_rank": "group group_rank",
    "get_all_ranks_from_group": "group",
    "initialize_mesh_device": "mesh_shape mesh_dim_names",
    "enable_symm_mem_for_group": "group_name",
    "mpi_discovery": "distributed_port verbose",
    "in_aml": "",
    "in_aws_sm": "",
    "in_dlts": "",
    "init_distributed": "dist_backend auto_mpi_discovery distributed_port verbose timeout "
    "init_method dist_init_required config rank world_size",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_their_names_and_order(name):
    assert list(inspect.signature(getattr(dist, name)).parameters) == SIGNATURES[name].split()


def test_the_remaining_public_names_are_there():
    assert [op.value for op in dist.ReduceOp] == list(range(9))
    assert dist.ReduceOp.AVG.value == 7
    group = dist.ProcessGroup(comm_id=3, ranks=[0, 2])
    assert (group.comm_id, group.ranks) == (3, [0, 2])
    from deepspeed.comm.backend import Backend
    from deepspeed.comm.ccl import CCLBackend
    from deepspeed.comm.torch import TorchBackend

    assert issubclass(TorchBackend, Backend)
    assert dist.TorchBackend is TorchBackend
    with pytest.raises(DeepSpeedCommError, match="ccl backend is not supported"):
        CCLBackend()


@pytest.fixture
def no_launcher(monkeypatch):
    for variable in (env.RANK, env.LOCAL_RANK, env.WORLD_SIZE, env.MASTER_ADDR, env.MASTER_PORT):
        monkeypatch.setenv(variable.name, "")
        monkeypatch.delenv(variable.name)


@pytest.fixture
def mpi(monkeypatch):
    """An mpi4py in which this process is rank 5 of 8, the second on its machine."""
    world = SimpleNamespace(
        Get_rank=lambda: 5,
        Get_size=lambda: 8,
        Split_type=lambda kind: SimpleNamespace(Get_rank=lambda: 1),
        bcast=lambda value, root: "10.1.2.3",
    )
    package = ModuleType("mpi4py")
    package.MPI = SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=0)
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setattr(rendezvous.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")


def test_an_mpi_job_is_discovered(no_launcher, mpi):
    assert rendezvous.discover(True, 29511, verbose=False) == rendezvous.World(5, 8)
    assert env.LOCAL_RANK.get() == 1
    assert (env.MASTER_ADDR.get(), env.MASTER_PORT.get()) == ("10.1.2.3", 29511)


@pytest.mark.parametrize(
    "names",
    [
        "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_RANK MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_LOCAL_RANK",
        "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID",
    ],
)
def test_a_job_numbered_by_its_launcher_needs_no_mpi4py(no_launcher, monkeypatch, names):
    monkeypatch.setattr(rendezvous.importlib.util, "find_spec", lambda name: None)
    for name, value in zip(names.split(), ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(DeepSpeedCommError, match="MASTER_ADDR"):
        rendezvous.discover(True, 29511, verbose=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert rendezvous.discover(True, 29511, verbose=False) == rendezvous.World(5, 8)
    assert (env.LOCAL_RANK.get(), env.MASTER_PORT.get()) == (1, 29511)


def test_mpi_processes_do_not_train_alone_by_mistake(no_launcher, mpi):
    with pytest.raises(DeepSpeedCommError, match="MPI started several processes"):
        rendezvous.discover(False, 29511, verbose=False)


def test_a_variable_that_contradicts_mpi_is_named(no_launcher, mpi, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(DeepSpeedCommError, match="LOCAL_RANK contradicts MPI"):
        rendezvous.discover(True, 29511, verbose=False)


@pytest.mark.parametrize(
    ("question", "variable"),
    [
        ("in_aml", "AZUREML_EXPERIMENT_ID"),
        ("in_aws_sm", "SM_TRAINING_ENV"),
        ("in_dlts", "DLTS_JOB_ID"),
    ],
)
def test_clouds_are_recognised(monkeypatch, question, variable):
    monkeypatch.delenv(variable, raising=False)
    assert not getattr(dist, question)()
    monkeypatch.setenv(variable, "x")
    assert getattr(dist, question)()


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 600), ("0.5", 30)])
def test_the_time_limit_is_in_minutes(monkeypatch, minutes, seconds):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if minutes:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    assert rendezvous.default_timeout().total_seconds() == seconds
