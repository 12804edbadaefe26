# SPDX-License-Identifier: Apache-2.0
"""What each stage of a pipeline does when: lists of instructions, a step at a time.

In training (PipeDream-Flush, or 1F1B, arXiv:2104.04473), stage s of S runs the forward pass of micro-batch m in step
``s + 2 m`` and its backward pass in step ``2 S - 1 - s + 2 m``, so forward and backward passes alternate, neighbours
are always at opposite ones, and every message is received in the step after that in which it was made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any


class PipeInstruction:
    """One thing to do; keyword arguments become attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.name, self.kwargs = type(self).__name__, kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.kwargs.items())})"


class OptimizerStep(PipeInstruction):
    """Step the optimizer, and zero the gradients."""


class ReduceGrads(PipeInstruction):
    """Average gradients over the data-parallel ranks of the stage."""


class ReduceTiedGrads(PipeInstruction):
    """Add up the gradients of modules that several stages share."""


class BufferOpInstruction(PipeInstruction):
    """Something to do with one of the stage's buffers."""

    def __init__(self, buffer_id: int, **kwargs: Any) -> None:
        super().__init__(buffer_id=buffer_id, **kwargs)


class LoadMicroBatch(BufferOpInstruction):
    """Take a micro-batch from the loader (first and last stage)."""


class ForwardPass(BufferOpInstruction):
    """Compute the stage's layers."""


class BackwardPass(BufferOpInstruction):
    """Compute the stage's gradients."""


class SendActivation(BufferOpInstruction):
    """Send the stage's output to the next one."""


class RecvActivation(BufferOpInstruction):
    """Receive the previous stage's output."""


class SendGrad(BufferOpInstruction):
    """Send the gradient of the stage's input to the previous one."""


class RecvGrad(BufferOpInstruction):
    """Receive the gradient of the stage's output from the next one."""


class PipeSchedule(ABC):
    """The steps of one stage.

    Args:
        micro_batches: micro-batches of a batch.
        stages: stages of the pipeline.
        stage_id: which one this is.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.micro_batches, self.stages, self.stage_id = micro_batches, stages, stage_id
        self.prev_stage, self.next_stage = stage_id - 1, stage_id + 1
        self.it: Iterator[list[PipeInstruction]] | None = None

    @abstractmethod
    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of each step."""

    def num_pipe_buffers(self) -> int:
        """How many micro-batches the stage holds at once, at most."""
        return self.micro_batches

    @property
    def stage(self) -> int:
        return self.stage_id

    @property
    def num_stages(self) -> int:
        return self.stages

    @property
    def num_micro_batches(self) -> int:
        return self.micro_batches

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.stages - 1

    def _valid_micro_batch(self, micro_batch_id: int) -> bool:
        return 0 <= micro_batch_id < self.micro_batches

    def _valid_stage(self, stage_id: int) -> bool:
        return 0 <= stage_id < self.stages

    def _buffer_idx(self, micro_batch_id: int) -> int:
        return micro_batch_id % self.num_pipe_buffers()

    def __iter__(self) -> PipeSchedule:
        self.it = None
        return self

    def __next__(self) -> list[PipeInstruction]:
        if self.it is None:
            self.it = self.steps()
        return next(self.it)


class InferenceSchedule(PipeSchedule):
    """Forward passes only: stage s computes micro-batch m in step ``s + m``."""

    def num_pipe_buffers(self) -> int:
        """One to receive into while the other is sent from."""
        return 2

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of each step; of neighbours, one sends first while the other receives."""
        for step in range(self.micro_batches + self.stages - 1):
            batch = step - self.stage_id
            here, there = batch % 2, (batch - 1) % 2
            now = self._valid_micro_batch(batch)
            does: list[PipeInstruction] = []
            if now and (self.is_first_stage or self.is_last_stage):
                does.append(LoadMicroBatch(here))
            sends: list[PipeInstruction] = []
            if self._valid_stage(self.next_stage) and self._valid_micro_batch(batch - 1):
                sends.append(SendActivation(there))
            receives: list[PipeInstruction] = []
            if self._valid_stage(self.prev_stage) and now:
                receives.append(RecvActivation(here))
            does += sends + receives if self.stage_id % 2 == 0 else receives + sends
            if now:
                does.append(ForwardPass(here))
            yield does


class TrainSchedule(PipeSchedule):
    """Forward and backward passes in turn, one of each in flight (1F1B)."""

    def num_pipe_buffers(self) -> int:
        """As many micro-batches as stages follow, this one included, and at least two."""
        return max(2, min(self.stages - self.stage_id, self.micro_batches))

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of each step."""
        total = 2 * (self.micro_batches + self.stages - 1)
        before = -1
        for step in range(total):
            batch, forward = self._step_to_micro_batch(step)
            does = self._messages(before, batch, forward)
            if self._valid_micro_batch(batch):
                buffer = self._buffer_idx(batch)
                if forward and (self.is_first_stage or self.is_last_stage):
                    does.append(LoadMicroBatch(buffer))
                does.append(ForwardPass(buffer) if forward else BackwardPass(buffer))
            if step == total - 1:
                does += [ReduceTiedGrads(), ReduceGrads(), OptimizerStep()]
            before = batch
            yield does

    def _messages(self, before: int, batch: int, forward: bool) -> list[PipeInstruction]:
        """With the previous stage before a forward pass, with the next one before a backward pass."""
        other = self.prev_stage if forward else self.next_stage
        if not self._valid_stage(other):
            return []
        made, wanted = self._valid_micro_batch(before), self._valid_micro_batch(batch)
        send = [(SendGrad if forward else SendActivation)(self._buffer_idx(before))] if made else []
        receive = (
            [(RecvActivation if forward else RecvGrad)(self._buffer_idx(batch))] if wanted else []
        )
        return [*send, *receive] if forward else [*receive, *send]

    def _step_to_micro_batch(self, step_id: int) -> tuple[int, bool]:
        """The micro-batch of a step (perhaps not a valid one), and whether it goes forward."""
        since = step_id - self.stage_id
        if since % 2 == 0:
            return since // 2, True
        return (step_id - (2 * self.stages - 1 - self.stage_id)) // 2, False


class DataParallelSchedule(PipeSchedule):
    """One stage: plain gradient accumulation."""

    def num_pipe_buffers(self) -> int:
        """One micro-batch at a time."""
        return 1

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of each micro-batch."""
        for batch in range(self.micro_batches):
            does: list[PipeInstruction] = [LoadMicroBatch(0), ForwardPass(0), BackwardPass(0)]
            if batch == self.micro_batches - 1:
                does += [ReduceGrads(), OptimizerStep()]
            yield does
