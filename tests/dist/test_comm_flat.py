# SPDX-License-Identifier: Apache-2.0
"""The flat verbs over real gloo ranks, against the same sums done in one process."""

from __future__ import annotations

import pytest
import torch

from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
WORLD = 3


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype == torch.int64:
        return torch.randint(-100, 100, (numel,), generator=generator)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def expected_sum(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum in float64 (exact for a few small numbers), rounded once."""
    wide = torch.int64 if dtype == torch.int64 else torch.float64
    return sum(values(rank, numel, dtype).to(wide) for rank in range(WORLD)).to(dtype)


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    # three numbers added in fp32, rounded once: one ulp of the dtype around 4 at the most
    ulp = 0 if expected.dtype == torch.int64 else 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(result, expected, rtol=0, atol=ulp)


def gather(rank, dtype, in_place, async_op):
    axis = Axis.of_group(None)
    out = torch.full((WORLD * 5,), 7).to(dtype)
    shard = out[rank * 5 : rank * 5 + 5] if in_place else torch.empty(5, dtype=dtype)
    shard.copy_(values(rank, 5, dtype))
    handle = flat.all_gather_into(out, shard, axis, async_op=async_op)
    handle.wait()
    return out


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather_puts_each_shard_in_its_place(ranks3, dtype, in_place, async_op):
    expected = torch.cat([values(rank, 5, dtype) for rank in range(WORLD)])
    for out in ranks3.run(gather, dtype, in_place, async_op):
        assert torch.equal(out, expected)


def scatter(rank, dtype, in_place, async_op):
    axis = Axis.of_group(None)
    full = values(rank, WORLD * 7, dtype)
    shard = full[rank * 7 : rank * 7 + 7] if in_place else torch.empty(7, dtype=dtype)
    flat.reduce_scatter_into(shard, full, axis, async_op=async_op).wait()
    return shard.clone(), full


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter_sums_each_slice_onto_its_rank(ranks3, dtype, in_place, async_op):
    expected = expected_sum(WORLD * 7, dtype).chunk(WORLD)
    for rank, (shard, full) in enumerate(ranks3.run(scatter, dtype, in_place, async_op)):
        close(shard, expected[rank])
        if not in_place:
            assert torch.equal(full, values(rank, WORLD * 7, dtype))


SEGMENTS = {
    "in order": [(0, 0, 4), (1, 4, 4), (2, 8, 4)],
    "gaps and shuffled owners": [(2, 1, 3), (0, 5, 2), (2, 9, 4), (1, 14, 1)],
    "one owner has nothing": [(0, 0, 6), (2, 6, 10)],
    "an empty segment": [(1, 3, 0), (0, 2, 5)],
}


def to_owners(rank, dtype, segments, async_op):
    buffer = values(rank, 16, dtype)
    flat.reduce_to_owners(buffer, segments, Axis.of_group(None), async_op=async_op).wait()
    return buffer


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEGMENTS)
def test_reduce_to_owners_sums_segments_and_leaves_the_rest(ranks3, name, dtype, async_op):
    segments = SEGMENTS[name]
    expected = expected_sum(16, dtype)
    covered = torch.zeros(16, dtype=torch.bool)
    for _, start, length in segments:
        covered[start : start + length] = True
    buffers = ranks3.run(to_owners, dtype, segments, async_op)
    for owner, start, length in segments:
        close(buffers[owner][start : start + length], expected[start : start + length])
    for rank, buffer in enumerate(buffers):
        assert torch.equal(buffer[~covered], values(rank, 16, dtype)[~covered])


def reduced(rank, dtype, shape, op, async_op):
    numel = torch.Size(shape).numel()
    tensor = values(rank, numel, dtype).view(shape)
    flat.all_reduce_(tensor, Axis.of_group(None), op=op, async_op=async_op).wait()
    return tensor


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (20_001,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_sums_any_shape(ranks3, dtype, shape, async_op):
    expected = expected_sum(torch.Size(shape).numel(), dtype).view(shape)
    first, *others = ranks3.run(reduced, dtype, shape, "sum", async_op)
    close(first, expected)
    assert all(torch.equal(first, other) for other in others)  # the same bits everywhere


@pytest.mark.parametrize(("op", "function"), [("max", torch.amax), ("min", torch.amin)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_takes_extremes(ranks3, dtype, op, function):
    expected = function(torch.stack([values(rank, 9, dtype) for rank in range(WORLD)]), dim=0)
    for result in ranks3.run(reduced, dtype, (9,), op, False):
        assert torch.equal(result, expected)


def reduce_a_strided_parameter(rank):
    tensor = torch.nn.Parameter(torch.full((4, 6), rank + 1.0))
    view = tensor[:, ::2]
    flat.all_reduce_(view, Axis.of_group(None))
    return tensor.detach()


def test_all_reduce_takes_strided_views_of_leaves(ranks3):
    for result in ranks3.run(reduce_a_strided_parameter):
        assert result[:, ::2].eq(6).all()
    assert ranks3.run(reduce_a_strided_parameter)[1][:, 1::2].eq(2).all()


def copied(rank, dtype, shape, src):
    tensor = values(rank, torch.Size(shape).numel(), torch.int64).to(dtype).view(shape)
    flat.broadcast_(tensor, Axis.of_group(None), src=src)
    return tensor


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8, torch.complex64])
def test_broadcast_copies_any_dtype_and_shape(ranks3, dtype, shape):
    source = copied_source(dtype, shape)
    for result in ranks3.run(copied, dtype, shape, 1):
        assert torch.equal(result, source)


def copied_source(dtype, shape):
    return values(1, torch.Size(shape).numel(), torch.int64).to(dtype).view(shape)


def transposed(rank):
    tensor = torch.arange(6.0).view(2, 3).mul(rank).t()
    flat.broadcast_(tensor, Axis.of_group(None), src=2)
    return tensor


def test_broadcast_takes_strided_tensors(ranks3):
    for result in ranks3.run(transposed):
        assert torch.equal(result, torch.arange(6.0).view(2, 3).mul(2).t())


def voted(rank, sayers_of_no):
    return flat.all_ok(rank not in sayers_of_no, Axis.of_group(None))


@pytest.mark.parametrize(("noes", "outcome"), [((), True), ((2,), False), ((0, 1, 2), False)])
def test_one_no_decides_the_vote(ranks3, noes, outcome):
    assert ranks3.run(voted, noes) == [outcome] * WORLD


def many_in_flight(rank):
    axis = Axis.of_group(None)
    buffers = [torch.full((6,), float(rank + k)) for k in range(8)]
    shards = [torch.empty(2) for _ in buffers]
    handles = [
        flat.reduce_scatter_into(shard, full, axis, async_op=True)
        for shard, full in zip(shards, buffers, strict=True)
    ]
    for handle in reversed(handles):
        handle.wait()
        handle.wait()  # a second wait is harmless
    return shards


def test_several_operations_in_flight_do_not_mix(ranks3):
    for shards in ranks3.run(many_in_flight):
        for k, shard in enumerate(shards):
            assert shard.eq(3.0 * k + 3).all()


def one_of_a_row(rank):
    tensor = torch.full((2, 7), float(rank), dtype=torch.bfloat16)[:, :1].view(2)[:1]
    flat.broadcast_(tensor, Axis.of_group(None), src=2)
    return tensor.stride(), tensor.item()


def test_broadcast_takes_one_element_of_any_stride(ranks3):
    assert ranks3.run(one_of_a_row) == [((7,), 2.0)] * WORLD
