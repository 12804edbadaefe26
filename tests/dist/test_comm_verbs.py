# SPDX-License-Identifier: Apache-2.0
"""The public collectives, process groups and rendezvous over real gloo ranks."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ranks import RankError, RankPool, RankTimeout, run_ranks

LOW = [torch.float32, torch.bfloat16, torch.float16]


def dist_of(rank):
    from deepspeed import comm

    comm.init_distributed()
    return comm


# ------------------------------------------------------------------ reductions
def reductions(rank, dtype):
    dist = dist_of(rank)
    mine = torch.tensor([rank + 1.0, 8.0, -2.0 * rank]).to(dtype)
    results = {}
    for op in ("SUM", "AVG", "MAX", "MIN", "PRODUCT"):
        results[op] = mine.clone()
        assert dist.all_reduce(results[op], op=dist.ReduceOp[op]) is None
    results["torch's SUM"] = mine.clone()
    dist.all_reduce(results["torch's SUM"], op=torch.distributed.ReduceOp.SUM)
    results["async AVG"] = mine.clone()
    dist.all_reduce(results["async AVG"], op=dist.ReduceOp.AVG, async_op=True).wait()
    results["coalesced"] = mine.clone()
    dist.all_reduce_coalesced([results["coalesced"], mine.clone()])
    return results


@pytest.mark.parametrize("dtype", LOW)
def test_all_reduce_knows_every_reduction(ranks2, dtype):
    expected = {
        "SUM": [3.0, 16.0, -2.0],
        "AVG": [1.5, 8.0, -1.0],
        "MAX": [2.0, 8.0, 0.0],
        "MIN": [1.0, 8.0, -2.0],
        "PRODUCT": [2.0, 64.0, 0.0],
    }
    expected["torch's SUM"] = expected["coalesced"] = expected["SUM"]
    expected["async AVG"] = expected["AVG"]
    for results in ranks2.run(reductions, dtype):
        for name, values in expected.items():  # exact in every dtype
            assert torch.equal(results[name].abs(), torch.tensor(values).to(dtype).abs()), name


def averaged_integers(rank):
    dist = dist_of(rank)
    tensor = torch.tensor([rank, 7])
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    return tensor


def test_averages_of_integers_round_down(ranks2):
    assert [result.tolist() for result in ranks2.run(averaged_integers)] == [[0, 7], [0, 7]]


def scattered(rank, dtype, op):
    dist = dist_of(rank)
    full = (torch.arange(8.0) * (rank + 1)).to(dtype).view(4, 2)
    outs = [torch.empty(2, 2, dtype=dtype) for _ in range(3)]
    dist.reduce_scatter_tensor(outs[0], full, op=dist.ReduceOp[op])
    dist.reduce_scatter_fn(outs[1], full, op=dist.ReduceOp[op], async_op=True).wait()
    dist.reduce_scatter(outs[2], list(full.chunk(2)), op=dist.ReduceOp[op])
    return outs


@pytest.mark.parametrize("op", ["SUM", "AVG"])
@pytest.mark.parametrize("dtype", LOW)
def test_reduce_scatter_gives_each_rank_its_rows(ranks2, dtype, op):
    whole = torch.arange(8.0).mul(3.0 if op == "SUM" else 1.5).to(dtype).view(4, 2)
    for rank, outs in enumerate(ranks2.run(scattered, dtype, op)):
        for out in outs:
            assert torch.equal(out, whole[2 * rank : 2 * rank + 2])


def reduced_to_one(rank, dtype):
    dist = dist_of(rank)
    tensor = torch.full((3,), rank + 1.0).to(dtype)
    dist.reduce(tensor, 1)
    return tensor


@pytest.mark.parametrize("dtype", LOW)
def test_reduce_gives_the_sum_to_one_rank(ranks2, dtype):
    assert ranks2.run(reduced_to_one, dtype)[1].eq(3).all()


# ------------------------------------------------------------------ copies
def copies(rank, dtype):
    dist = dist_of(rank)
    mine = torch.tensor([rank, rank + 10]).to(dtype)
    seen = {"list": [torch.empty(2, dtype=dtype) for _ in range(2)]}
    dist.all_gather(seen["list"], mine)
    seen["flat"] = torch.empty(4, dtype=dtype)
    dist.all_gather_into_tensor(seen["flat"], mine)
    seen["old name"] = torch.empty(4, dtype=dtype)
    dist.allgather_fn(seen["old name"], mine)
    seen["coalesced"] = torch.empty(4, dtype=dtype)
    dist.all_gather_coalesced([seen["coalesced"]], [mine], async_op=True).wait()
    seen["broadcast"] = mine.clone()
    dist.broadcast(seen["broadcast"], 1)
    seen["single"] = torch.empty(2, dtype=dtype)
    dist.all_to_all_single(seen["single"], mine)
    seen["lists"] = [torch.empty(1 + i, dtype=dtype) for i in range(2)]
    ours = [torch.full((rank + 1,), 10 * rank + i).to(dtype) for i in range(2)]
    dist.all_to_all(seen["lists"], ours)
    seen["gathered"] = [torch.zeros(2, dtype=dtype) for _ in range(2)]
    dist.gather(mine, seen["gathered"] if rank == 0 else None, dst=0)
    seen["dealt"] = torch.empty(2, dtype=dtype)
    dist.scatter(seen["dealt"], [mine, mine + 1] if rank == 1 else None, src=1)
    return seen


@pytest.mark.parametrize("dtype", [*LOW, torch.int64, torch.uint8])
def test_copies_arrive_where_they_belong(ranks2, dtype):
    results = ranks2.run(copies, dtype)
    both = torch.tensor([0, 10, 1, 11]).to(dtype)
    for rank, seen in enumerate(results):
        assert torch.equal(torch.cat(seen["list"]), both)
        for name in ("flat", "old name", "coalesced"):
            assert torch.equal(seen[name], both), name
        assert torch.equal(seen["broadcast"], torch.tensor([1, 11]).to(dtype))
        assert torch.equal(seen["single"], both[rank::2])
        assert [part.tolist() for part in seen["lists"]] == [[rank], [10 + rank] * 2]
        assert torch.equal(seen["dealt"], torch.tensor([1 + rank, 11 + rank]).to(dtype))
    assert torch.equal(torch.cat(results[0]["gathered"]), both)


def objects(rank):
    dist = dist_of(rank)
    everyone = [None, None]
    dist.all_gather_object(everyone, {"rank": rank})
    words = ["from", rank]
    dist.broadcast_object_list(words, 1)
    return everyone, words


def test_objects_travel_by_pickle(ranks2):
    for everyone, words in ranks2.run(objects):
        assert everyone == [{"rank": 0}, {"rank": 1}]
        assert words == ["from", 1]


def ping_pong(rank):
    dist = dist_of(rank)
    tensor = torch.arange(3.0) if rank == 0 else torch.zeros(3)
    if rank == 0:
        dist.send(tensor, 1)
        dist.irecv(tensor, 1).wait()
    else:
        assert dist.recv(tensor, 0) == 0
        dist.isend(tensor * 2, 0).wait()
    dist.monitored_barrier()
    return tensor


def test_point_to_point_there_and_back(ranks2):
    first, second = ranks2.run(ping_pong)
    assert torch.equal(first, torch.arange(3.0) * 2)
    assert torch.equal(second, torch.arange(3.0))


# ------------------------------------------------------------------ groups
def subgroup(rank):
    dist = dist_of(rank)
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        assert dist.get_rank(group) == -1
        return None
    tensor = torch.tensor([float(rank)])
    dist.all_reduce(tensor, group=group)
    return (
        tensor.item(),
        dist.get_rank(group),
        dist.get_global_rank(group, 0),
        dist.get_all_ranks_from_group(group),
    )


def test_a_subgroup_works_among_its_members(ranks4):
    assert ranks4.run(subgroup) == [None, (4.0, 0, 1, [1, 3]), None, (4.0, 1, 1, [1, 3])]


def mesh_sums(rank, sizes):
    from deepspeed.comm import flat
    from deepspeed.comm.mesh import Mesh

    mesh = Mesh.build(4, rank, **sizes)
    again = Mesh.build(4, rank, **sizes)
    found = {}
    for name in ("world", "data", "sequence", "tensor", "pipe", "sequence_data"):
        axis = getattr(mesh, name)
        assert axis.ranks[axis.rank] == rank
        assert (axis.group is None) == (axis.size == 1)
        assert getattr(again, name).group is axis.group  # made once
        tensor = torch.tensor(2.0**rank)
        flat.all_reduce_(tensor, axis)
        assert tensor == sum(2.0**other for other in axis.ranks)
        found[name] = axis.ranks
    return found


def test_a_mesh_of_two_axes_sums_along_each(ranks4):
    results = ranks4.run(mesh_sums, {"tensor": 2})
    assert [found["tensor"] for found in results] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [found["data"] for found in results] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    ranks4.run(mesh_sums, {"sequence": 2, "pipe": 2})


def group_getters(rank):
    import deepspeed.comm as dist
    from deepspeed.utils import groups

    groups.reset()
    assert groups._get_data_parallel_world_size() == 4
    assert groups._get_data_parallel_rank() == rank
    assert groups._get_sequence_parallel_world_size() == 1
    assert groups.get_model_parallel_world_size() == 1
    alone = groups._get_sequence_parallel_group()
    tensor = torch.tensor(float(rank))
    dist.all_reduce(tensor, group=alone)  # a group of one, not everybody
    assert tensor == rank
    groups._create_expert_and_data_parallel(2)
    groups._create_expert_and_data_parallel(1)
    assert groups._get_max_expert_size_name() == "ep_size_2"
    assert set(groups._get_expert_parallel_group_dict()) == {"ep_size_1", "ep_size_2"}
    dist.all_reduce(tensor, group=groups._get_expert_parallel_group("ep_size_2"))
    result = (
        tensor.item(),
        groups._get_expert_parallel_rank("ep_size_2"),
        groups._get_expert_parallel_src_rank("ep_size_2"),
        groups._get_expert_data_parallel_group_ranks("ep_size_2"),
        groups._get_expert_data_parallel_world_size("ep_size_1"),
    )
    groups.reset()
    return result


def test_group_getters_answer_from_the_mesh(ranks4):
    assert ranks4.run(group_getters) == [
        (1.0, 0, 0, [0, 2], 4),
        (1.0, 1, 0, [1, 3], 4),
        (5.0, 0, 2, [0, 2], 4),
        (5.0, 1, 2, [1, 3], 4),
    ]


def data_before_experts(rank):
    from deepspeed.utils import groups

    groups.reset()
    groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True)
    result = groups._get_expert_parallel_group_ranks("ep_size_2")
    groups.reset()
    return result


def test_experts_can_be_spread_far(ranks4):
    assert ranks4.run(data_before_experts) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def tensor_parallel_pairs(rank):
    from deepspeed.utils import groups

    groups.reset()
    groups._init_tp_mesh_device(2, 2)
    result = (
        groups.get_tensor_model_parallel_rank(),
        groups.get_tensor_model_parallel_src_rank(),
        groups._get_data_parallel_group_ranks(),
    )
    groups.reset()
    return result


def test_tensor_parallel_pairs_are_neighbours(ranks4):
    assert ranks4.run(tensor_parallel_pairs) == [
        (0, 0, [0, 2]),
        (1, 0, [1, 3]),
        (0, 2, [0, 2]),
        (1, 2, [1, 3]),
    ]


def partitioned(rank):
    import deepspeed.comm as dist
    from deepspeed.runtime.utils import PartitionedTensor

    dist.init_distributed()
    whole = torch.arange(7.0).view(7, 1)
    group = dist.get_world_group()
    part = PartitionedTensor(whole, group)
    again = PartitionedTensor.from_meta(part.to_meta(), part.data(), group)
    assert torch.equal(again.full(), whole)
    return part.data(), part.full()


def test_partitioned_tensor_comes_back_whole(ranks3):
    results = ranks3.run(partitioned)
    assert [part.numel() for part, _ in results] == [3, 2, 2]
    assert all(torch.equal(full, torch.arange(7.0).view(7, 1)) for _, full in results)


def overflow(rank, bad_rank):
    from deepspeed.runtime.utils import CheckOverflow

    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, float("inf") if rank == bad_rank else 0.0])
    found = CheckOverflow([[param]], zero_reduce_scatter=True).check()
    param.allreduce = False  # an expert's
    norm = float("inf") if rank == bad_rank else 1.0
    by_norm = CheckOverflow([[param]]).check_using_norm([norm], reduce_overflow=False)
    assert by_norm == found
    return found


@pytest.mark.parametrize(("bad", "found"), [(1, True), (None, False)])
def test_an_overflow_on_one_rank_is_known_to_all(ranks2, bad, found):
    assert ranks2.run(overflow, bad) == [found, found]


# ------------------------------------------------------------------ joining by the environment
def join_again(rank, method):
    import deepspeed.comm as dist

    torch.distributed.destroy_process_group()
    assert not dist.is_initialized()
    if method == "environment":
        dist.init_distributed()
    else:
        from deepspeed.utils import env

        for variable in (env.RANK, env.WORLD_SIZE, env.LOCAL_RANK):
            variable.unset()
        port = env.MASTER_PORT.raw()
        dist.init_distributed(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
        )
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    return tensor.item(), dist.get_rank()


@pytest.mark.parametrize("method", ["environment", "arguments"])
def test_ranks_join_over_tcp(method):
    assert run_ranks(join_again, 2, method) == [(2.0, 0), (2.0, 1)]


# ------------------------------------------------------------------ the helper itself
def fails_on_one(rank):
    if rank == 1:
        raise KeyError("rank one's own message")
    torch.distributed.barrier()


def hangs_on_one(rank):
    if rank == 0:
        torch.distributed.barrier()


def dies(rank):
    import os

    os._exit(3)


def fine(rank):
    return rank


def test_the_pool_reports_a_failing_rank_and_goes_on():
    with RankPool(2) as pool:
        with pytest.raises(RankError, match=r"rank 1 of 2 failed[\s\S]*rank one's own message"):
            pool.run(fails_on_one)
        assert pool.run(fine) == [0, 1]
        with pytest.raises(RankTimeout, match=r"ranks \[0\] did not finish[\s\S]*hangs_on_one"):
            pool.run(hangs_on_one, timeout=2)
        with pytest.raises(RankError, match="died with exit code 3"):
            pool.run(dies)
