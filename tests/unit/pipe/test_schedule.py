# SPDX-License-Identifier: Apache-2.0
"""Schedules of a pipeline, simulated: every message meets its receiver, and every micro-batch passes every stage."""

from __future__ import annotations

import pytest

from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
    _prime_factors,
    _square_topology,
)

OTHER = {
    schedule.SendActivation: (1, schedule.RecvActivation),
    schedule.SendGrad: (-1, schedule.RecvGrad),
}


def run(kind, micro_batches, stages):
    """Run all stages with messages that block both ends; returns what each buffer went through."""
    plans = [kind(micro_batches, stages, stage) for stage in range(stages)]
    todo = [[i for step in plan for i in step] for plan in plans]
    done = [[] for _ in range(stages)]
    while any(todo):
        moved = False
        for stage in range(stages):
            while (
                todo[stage]
                and type(todo[stage][0]) not in OTHER
                and not type(todo[stage][0]).__name__.startswith("Recv")
            ):
                done[stage].append(todo[stage].pop(0))
                moved = True
            if todo[stage] and type(todo[stage][0]) in OTHER:
                step, receives = OTHER[type(todo[stage][0])]
                other = todo[stage + step]
                if other and type(other[0]) is receives:
                    done[stage].append(todo[stage].pop(0))
                    done[stage + step].append(other.pop(0))
                    moved = True
        assert moved, f"stuck: {[row[:1] for row in todo]}"
    return done


def named(row, name):
    return [i for i in row if type(i).__name__ == name]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5, 8])
def test_training_runs_every_micro_batch_through_every_stage_without_a_deadlock(
    micro_batches, stages
):
    done = run(schedule.TrainSchedule, micro_batches, stages)
    for stage, row in enumerate(done):
        for name in ("ForwardPass", "BackwardPass"):
            assert len(named(row, name)) == micro_batches
        ends = stage in (0, stages - 1)
        assert len(named(row, "LoadMicroBatch")) == micro_batches * ends
        assert [type(i).__name__ for i in row[-3:]] == [
            "ReduceTiedGrads",
            "ReduceGrads",
            "OptimizerStep",
        ]
        held = {}
        for instruction in row:
            buffer = getattr(instruction, "buffer_id", None)
            if isinstance(instruction, schedule.ForwardPass):
                assert buffer not in held, "a buffer is overwritten before its backward pass"
                held[buffer] = True
            if isinstance(instruction, schedule.BackwardPass):
                held.pop(buffer)
        count = schedule.TrainSchedule(micro_batches, stages, stage).num_pipe_buffers()
        assert count == max(2, min(stages - stage, micro_batches))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 4])
def test_inference_runs_forward_only(micro_batches, stages):
    for row in run(schedule.InferenceSchedule, micro_batches, stages):
        assert len(named(row, "ForwardPass")) == micro_batches
        assert not named(row, "BackwardPass")


def test_one_stage_is_gradient_accumulation():
    steps = list(schedule.DataParallelSchedule(3, 1, 0))
    assert [len(step) for step in steps] == [3, 3, 5]
    assert repr(steps[0][0]) == "LoadMicroBatch(buffer_id=0)"


def test_places_on_a_grid():
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    assert grid.get_axis_names() == ["pipe", "data", "model"]
    assert grid.world_size() == 8
    assert grid.get_rank(pipe=1, data=0, model=1) == 5
    assert grid.get_coord(5) == (1, 0, 1)
    assert grid.get_rank_repr(5) == "model_01"
    assert grid.get_rank_repr(5, omit_axes=["data"]) == "pipe_01-model_01"
    assert grid.get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.get_axis_comm_lists("nothing") == []
    assert grid.filter_match(pipe=0, data=1) == [2, 3]
    assert grid.get_axis_list("data", 1) == [2, 3, 6, 7]
    assert (grid.get_dim("model"), grid.get_dim("nothing")) == (2, 0)
    assert PipeDataParallelTopology(2, 3).get_rank_repr(4) == ""


def test_places_that_are_not_there_are_refused():
    grid = ProcessTopology(["a", "b"], [2, 2])
    with pytest.raises(ValueError, match="needs every axis once"):
        grid.get_rank(a=1)
    with pytest.raises(ValueError, match="no such place"):
        grid.get_rank(a=2, b=0)
    with pytest.raises(ValueError, match="rank 9"):
        grid.get_coord(9)


def test_a_grid_without_a_topology_deals_prime_factors_in_turn():
    assert [_prime_factors(number) for number in (1, 7, 12)] == [[], [7], [2, 2, 3]]
    assert (_square_topology(12).get_dim("pipe"), _square_topology(12).get_dim("data")) == (6, 2)
    with pytest.raises(ValueError, match="positive"):
        _prime_factors(0)
