# SPDX-License-Identifier: Apache-2.0
"""What is replicated, what is sharded, and where it lives: one frozen row per run.

Stages 0 to 3 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) are rows of one table, not programs. Everything below
the engine reads this object and never the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

# A collective above this size gains no bandwidth, but holds memory and starts later.
_LARGEST_BUCKET_NUMEL = 32 * 1024 * 1024
# Pieces of gradients that may be on their way to files at once: enough to keep a disk busy.
WRITES_BEHIND = 4
# Elements of a part of the states below which its files take longer to make than their bytes to write, and how many
# parts that small there may be.
SMALL_PART = 256 * 1024
MOST_SMALL_PARTS = 64
# Buckets whose reduction may be under way at once, where reduction overlaps with the backward pass.
_BUCKETS_IN_FLIGHT = 2


class Placement(Enum):
    """How the ranks of the data axis hold one kind of state."""

    REPLICATED = "replicated"
    """Every rank holds all of it."""
    SHARDED = "sharded"
    """Every rank holds one equal part of it."""


class TierKind(Enum):
    """Where bytes live."""

    DEVICE = "device"
    """In the memory that computes the model."""
    HOST = "host"
    """In CPU memory (ZeRO-Offload, arXiv:2101.06840)."""
    FILE = "file"
    """In files, brought into CPU memory for use (ZeRO-Infinity, arXiv:2104.07857)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The row of the ZeRO table that a run executes.

    Attributes:
        stage: the number users know the row by.
        params, grads, states: placement over the data axis.
        state_tier: where master weights and optimizer states live.
        param_tier: where the slices of sharded parameters live.
        host_ratio: share of each rank's states that goes to the host tier, 0 to 1; the rest stays on the device.
        pin_memory: whether host memory is page-locked where the device can use that.
        part_numel: elements of states that are to be stepped, and read from files, at once; `part_of` is what is.
        reduce_bucket_numel: elements that one gradient collective is to carry at most; `bucket_numel` is what it does.
        overlap_reduce: start gradient collectives during the backward pass and wait for them at its end.
        round_robin: lay parameters so that neighbours in the backward pass belong to different ranks.
        gradient_op: "mean" or "sum" over the data axis.
        summed_ranks: ranks that share a sequence, whose gradients add up where others are averaged.
        prescale: divide by the number of ranks before the reduction rather than after it.
        gradient_bits: of the codes that gradients of sharded matrices travel as (qgZ); 0 sends them as they are.
        error_feedback: share of the old error that is kept, and after how many reductions it is forgotten (LoCo); None
            lets go of what codes lose.
        every_gradient: a parameter without a gradient since the last step is an error.
        masters_apart: master weights never share memory with the parameters, so that a step may run beside the model.
        predivide_factor: with `prescale` off, divide by this before the reduction and by the rest after it.
    """

    stage: int
    params: Placement
    grads: Placement
    states: Placement
    state_tier: TierKind = TierKind.DEVICE
    param_tier: TierKind = TierKind.DEVICE
    host_ratio: float = 1.0
    pin_memory: bool = True
    part_numel: int = 2**62
    reduce_bucket_numel: int = 500_000_000
    overlap_reduce: bool = False
    round_robin: bool = False
    gradient_op: str = "mean"
    summed_ranks: int = 1
    prescale: bool = False
    predivide_factor: float = 1.0
    gradient_bits: int = 0
    error_feedback: tuple[float, int] | None = None
    every_gradient: bool = False
    masters_apart: bool = False

    @classmethod
    def for_stage(cls, stage: int) -> Plan:
        """The row of `stage`, everything on the device.

        Raises:
            ValueError: if `stage` is not 0, 1, 2 or 3.
        """
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO has stages 0 to 3, got {stage!r}")
        placed = (Placement.REPLICATED, Placement.SHARDED)
        return cls(
            stage=stage,
            params=placed[stage >= 3],
            grads=placed[stage >= 2],
            states=placed[stage >= 1],
        )

    def on_host(self, ratio: float = 1.0, pin_memory: bool = True) -> Plan:
        """The same row with `ratio` of the states in host memory."""
        return replace(self, state_tier=TierKind.HOST, host_ratio=ratio, pin_memory=pin_memory)

    @property
    def bucket_numel(self) -> int:
        """Elements that one gradient collective carries at most, unless a single parameter has more."""
        return max(1, min(self.reduce_bucket_numel, _LARGEST_BUCKET_NUMEL))

    def part_of(self, total: int) -> int:
        """Elements of states that are stepped at once, at most, of `total`."""
        return max(1, self.part_numel, min(SMALL_PART, -(-total // MOST_SMALL_PARTS)))

    @property
    def buckets_in_flight(self) -> int:
        """Buckets whose reduction is under way while the next one fills, at most."""
        return _BUCKETS_IN_FLIGHT if self.overlap_reduce else 0

    @property
    def reduces_each_backward(self) -> bool:
        """Sharded gradients have no room for unreduced sums, so every backward pass reduces them."""
        return self.grads is Placement.SHARDED
