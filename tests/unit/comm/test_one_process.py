# SPDX-License-Identifier: Apache-2.0
"""A process without a launcher: it gets a default group of its own, or does without."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import torch

from deepspeed import comm as dist
from deepspeed.comm import comm as comm_module
from deepspeed.comm import flat, rendezvous
from deepspeed.comm.mesh import Axis
from deepspeed.utils import env
from deepspeed.utils.errors import DeepSpeedCommError
from deepspeed.utils.logging import logger

LAUNCH = (
    env.RANK,
    env.LOCAL_RANK,
    env.WORLD_SIZE,
    env.LOCAL_SIZE,
    env.MASTER_ADDR,
    env.MASTER_PORT,
    env.OMPI_SIZE,
    env.PMI_SIZE,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for variable in LAUNCH:
        monkeypatch.setenv(variable.name, "")  # so that what the test sets is undone
        monkeypatch.delenv(variable.name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    comm_module.cdb = None


def test_a_plain_script_gets_a_group_without_opening_a_port(monkeypatch):
    def refuse(*args):
        raise AssertionError("a port was opened")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(torch.distributed, "TCPStore", refuse)
    dist.init_distributed()
    assert torch.distributed.is_initialized()
    assert (dist.get_rank(), dist.get_world_size(), dist.get_local_rank()) == (0, 1, 0)
    assert [env.RANK.get(), env.LOCAL_RANK.get(), env.WORLD_SIZE.get()] == [0, 0, 1]
    assert env.MASTER_ADDR.get() == "127.0.0.1"
    torch.distributed.barrier()


def test_a_launcher_of_one_process_gets_the_same(monkeypatch):
    monkeypatch.setattr(torch.distributed, "TCPStore", None)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 12345}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_distributed(auto_mpi_discovery=False)
    assert dist.get_world_size() == 1
    assert env.MASTER_PORT.get() == 12345  # what was set stays


def test_torch_without_a_hash_store_gets_a_file_store(monkeypatch):
    monkeypatch.delattr(torch.distributed, "HashStore", raising=False)
    dist.init_distributed()
    assert dist.get_world_size() == 1


def test_a_second_call_does_nothing():
    dist.init_distributed("gloo")
    first = dist.cdb
    dist.init_distributed("nccl", world_size=7, rank=3)
    assert dist.cdb is first


def test_nccl_without_cuda_becomes_gloo_and_says_so_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from deepspeed.utils import logging as ds_logging

    ds_logging._said.clear()
    lines = []
    monkeypatch.setattr(logger, "warning", lambda text, **kw: lines.append(str(text)))
    dist.init_distributed("nccl")
    assert dist.get_backend() == "gloo"
    assert rendezvous.usable_backend("nccl") == "gloo"
    assert len(lines) == 1
    assert "no CUDA device" in lines[0]


def test_a_group_that_the_script_made_is_taken_over():
    torch.distributed.init_process_group(
        "gloo", store=rendezvous._own_store(), rank=0, world_size=1
    )
    assert dist.is_initialized()
    dist.init_distributed(dist_init_required=False)
    assert dist.get_world_size() == 1


def test_dist_init_required_false_asserts():
    with pytest.raises(AssertionError, match="dist_init_required"):
        dist.init_distributed(dist_init_required=False)


def test_collectives_before_init_say_what_to_call():
    with pytest.raises(AssertionError, match="init_distributed"):
        dist.get_rank()
    with pytest.raises(AssertionError, match="init_distributed"):
        dist.all_reduce(torch.ones(1))


def test_a_group_can_be_left_and_joined_again():
    dist.init_distributed()
    dist.destroy_process_group()
    assert not dist.is_initialized()
    dist.init_distributed()
    assert dist.get_rank() == 0


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_an_incomplete_environment_is_named(monkeypatch, missing):
    full = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "h", "MASTER_PORT": 1}
    for name, value in full.items():
        if name != missing:
            monkeypatch.setenv(name, str(value))
    with pytest.raises(DeepSpeedCommError, match=f"missing {missing}"):
        dist.init_distributed("gloo")


def test_a_rank_outside_the_world_is_refused(monkeypatch):
    full = {"RANK": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "h", "MASTER_PORT": 1}
    for name, value in full.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(DeepSpeedCommError, match="RANK=2"):
        dist.init_distributed("gloo")


def test_a_port_in_use_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        full = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": port}
        for name, value in {**full, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(DeepSpeedCommError, match="port is in use"):
            dist.init_distributed("gloo")


def test_mpi_without_mpi4py_says_what_to_install(monkeypatch):
    monkeypatch.setattr(rendezvous.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(DeepSpeedCommError, match="pip install mpi4py"):
        dist.init_distributed("gloo")


def test_an_azure_job_is_translated(monkeypatch):
    for name, value in {
        "AZUREML_EXPERIMENT_ID": "x",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000",
    }.items():
        monkeypatch.setenv(name, value)
    assert rendezvous.discover(True, 29500, False) == rendezvous.World(3, 4)
    assert (env.MASTER_ADDR.get(), env.MASTER_PORT.get()) == ("10.0.0.4", 6000)
    assert env.LOCAL_RANK.get() == 1


# ------------------------------------------------------------------ torch without distributed
@pytest.fixture
def without_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)


@pytest.fixture(params=["in-process group", "no torch.distributed"])
def alone(request):
    if request.param == "no torch.distributed":
        request.getfixturevalue("without_distributed")
    dist.init_distributed()
    return request.param


def test_who_is_there_when_alone(alone):
    assert dist.is_initialized()
    assert (dist.get_rank(), dist.get_world_size(), dist.get_global_rank()) == (0, 1, 0)
    assert dist.get_all_ranks_from_group() == [0]


def test_every_collective_copies_or_does_nothing_when_alone(alone):
    x = torch.arange(4.0)
    same = x.clone()
    for verb in (dist.all_reduce, dist.inference_all_reduce):
        assert verb(x) is None
    dist.all_reduce_coalesced([x])
    dist.reduce(x, 0)
    dist.broadcast(x, 0)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert torch.equal(x, same)
    for verb in (
        dist.all_gather_into_tensor,
        dist.allgather_fn,
        dist.reduce_scatter_tensor,
        dist.reduce_scatter_fn,
        dist.all_to_all_single,
    ):
        out = torch.zeros(4)
        assert verb(out, x) is None
        assert torch.equal(out, x), verb
    for call in (
        lambda out: dist.all_gather([out], x),
        lambda out: dist.all_gather_coalesced([out], [x]),
        lambda out: dist.reduce_scatter(out, [x]),
        lambda out: dist.all_to_all([out], [x]),
        lambda out: dist.gather(x, [out]),
        lambda out: dist.scatter(out, [x]),
    ):
        out = torch.zeros(4)
        call(out)
        assert torch.equal(out, x)
    objects = [None]
    dist.all_gather_object(objects, {"a": 1})
    dist.broadcast_object_list(objects, 0)
    assert objects == [{"a": 1}]
    dist.barrier()
    dist.monitored_barrier()


def test_asynchronous_calls_return_handles_when_alone(alone):
    out = torch.zeros(2)
    dist.all_reduce(out, async_op=True).wait()
    dist.all_gather_into_tensor(out, torch.ones(2), async_op=True).wait()
    assert out.eq(1).all()
    assert dist.barrier(async_op=True) is not None


def test_several_processes_need_torch_distributed(without_distributed, monkeypatch):
    full = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "h", "MASTER_PORT": 1}
    for name, value in full.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(DeepSpeedCommError, match="no distributed package"):
        dist.init_distributed()


# ------------------------------------------------------------------ flat verbs on an axis of one
def test_flat_verbs_copy_or_do_nothing_when_alone():
    axis = Axis.alone()
    shard, out = torch.arange(3.0), torch.zeros(3)
    flat.all_gather_into(out, shard, axis, async_op=True).wait()
    assert torch.equal(out, shard)
    flat.reduce_scatter_into(out, torch.ones(3), axis)
    assert out.eq(1).all()
    flat.reduce_to_owners(out, [(0, 0, 3)], axis)
    flat.all_reduce_(out, axis, op="max")
    flat.broadcast_(out, axis)
    assert out.eq(1).all()
    assert flat.all_ok(True, axis)
    assert not flat.all_ok(False, axis)


@pytest.mark.parametrize(
    "call",
    [
        lambda axis: flat.all_gather_into(torch.ones(3), torch.ones(2), axis),
        lambda axis: flat.all_gather_into(torch.ones(2), torch.ones(2).bfloat16(), axis),
        lambda axis: flat.reduce_scatter_into(torch.ones(2), torch.ones(3), axis),
        lambda axis: flat.reduce_scatter_into(torch.ones(1, 2), torch.ones(2), axis),
        lambda axis: flat.reduce_to_owners(torch.ones(2), [(1, 0, 1)], axis),
        lambda axis: flat.reduce_to_owners(torch.ones(2), [(0, 1, 2)], axis),
        lambda axis: flat.all_reduce_(torch.ones(2), axis, op="mean"),
        lambda axis: flat.broadcast_(torch.ones(2), axis, src=1),
    ],
)
def test_flat_verbs_refuse_what_does_not_fit(call):
    with pytest.raises(DeepSpeedCommError):
        call(Axis.alone())


# ------------------------------------------------------------------ the communication logger
@pytest.fixture
def recorder():
    yield dist.comms_logger
    dist.configure(enabled=False, prof_all=True, prof_ops=[], verbose=False, debug=False)
    dist.reset_log()


def test_the_logger_counts_calls_by_name_and_size(recorder, capsys):
    dist.init_distributed()
    dist.configure(enabled=True)
    dist.all_reduce(torch.ones(256))
    dist.all_reduce(torch.ones(256))
    dist.all_reduce(torch.ones(2), log_name="tiny")
    assert dist.has_comm_data()
    assert dist.get_comm_operation_count() == 3
    assert dist.get_logged_comm_ops() == ["all_reduce", "tiny"]
    result = dist.log_summary(return_dict=True, show_straggler=True)
    row = result["summary"]["all_reduce"][1024]
    assert (row["count"], row["msg_size_bytes"], row["msg_size_str"]) == (2, 1024, "1.0 KB")
    assert row["total_latency_ms"] > 0
    assert result["straggler_analysis"]["tiny"][8]["total_straggler_ms"] == 0
    assert result["metadata"]["world_size"] == 1
    assert "all_reduce" in capsys.readouterr().out
    dist.reset_log()
    assert not dist.has_comm_data()


def test_the_logger_records_only_what_was_chosen(recorder):
    dist.init_distributed()
    dist.configure(enabled=True, prof_all=False, prof_ops=["broadcast"])
    dist.all_reduce(torch.ones(2))
    dist.broadcast(torch.ones(2), 0)
    dist.all_reduce(torch.ones(2), prof=True, log_name="asked")
    assert dist.get_logged_comm_ops() == ["broadcast", "asked"]


def test_the_logger_takes_its_section_of_the_configuration(recorder):
    section = SimpleNamespace(
        enabled=True, prof_all=False, prof_ops=["reduce"], verbose=False, debug=True
    )
    config = SimpleNamespace(
        comms_config=SimpleNamespace(comms_logger_enabled=True, comms_logger=section)
    )
    dist.configure(config, debug=False)
    assert (recorder.enabled, recorder.prof_all, recorder.prof_ops) == (True, False, ["reduce"])
    assert recorder.debug is False


def test_the_logger_is_off_by_default():
    dist.init_distributed()
    dist.all_reduce(torch.ones(2))
    assert not dist.has_comm_data()
