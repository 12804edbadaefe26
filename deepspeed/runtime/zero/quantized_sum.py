# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients over ranks that travel as small codes (ZeRO++ qgZ, arXiv:2306.10209; LoCo, arXiv:2407.04480).

Each rank encodes its row for every other rank, the rows are exchanged, and their owner decodes and adds them in fp32.
Codes are never added, so their error does not grow with the number of ranks. Where the axis has two hops, neighbours on
a machine sum first, and what crosses between machines is encoded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from deepspeed.comm import flat
from deepspeed.comm.handles import _close, _Pending
from deepspeed.comm.mesh import Axis
from deepspeed.ops.group_quant import GroupScheme, dequantize, quantize

# LoCo's settings where none are given: the share of an error that is kept, and the reductions after which it is forgotten.
LOCO_KEEP, LOCO_PERIOD = 0.8, 1024

# Values that share a scale: 4-bit codes have few steps, so groups are small; fp32 scales add 6 % of the codes' bytes.
GROUP = 128


@dataclass(frozen=True)
class RowCodec:
    """Rows of values as rows of bytes; some runs of columns quantized, each with groups of its own.

    A decoded value is off by at most half a step, max|group| / 14 for 4 bits, and by roundings of fp32. What is not
    finite decodes to something that is not finite.

    Attributes:
        runs: `(start, length, quantized)` of columns, in order, together the whole row.
        bits: of the codes.
    """

    runs: tuple[tuple[int, int, bool], ...]
    bits: int

    @classmethod
    def of(cls, row: int, quantized: Iterable[tuple[int, int]], bits: int) -> RowCodec:
        """The codec of rows of `row` columns whose runs `(start, length)` are `quantized`, the rest sent as it is."""
        runs, at = [], 0
        for start, length in sorted(quantized):
            if start > at:
                runs.append((at, start - at, False))
            if length:
                runs.append((start, length, True))
            at = start + length
        if at < row:
            runs.append((at, row - at, False))
        return cls(tuple(runs), bits)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of bytes for rows of values."""
        pieces = []
        for start, length, quantized in self.runs:
            values = rows[:, start : start + length]
            if not quantized:
                pieces.append(values.contiguous().view(torch.uint8))
                continue
            groups = -(-length // GROUP)
            whole = values.new_zeros(len(rows), groups * GROUP, dtype=torch.float32)
            whole[:, :length].copy_(values)
            codes, scale, _ = quantize(whole.view(-1, GROUP), self._scheme)
            pieces.append(scale.view(len(rows), groups).view(torch.uint8))
            pieces.append(codes.view(len(rows), -1))
        return torch.cat(pieces, dim=1)

    def decode(self, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """fp32 rows of what `encode` gave for rows of `dtype`."""
        row = self.runs[-1][0] + self.runs[-1][1]
        values = torch.empty(len(data), row, dtype=torch.float32, device=data.device)
        at = 0
        for start, length, quantized in self.runs:
            target = values[:, start : start + length]
            if not quantized:
                end = at + length * dtype.itemsize
                target.copy_(_aligned(data[:, at:end]).view(dtype))
                at = end
                continue
            groups = -(-length // GROUP)
            sides, end = at + 4 * groups, at + 4 * groups + groups * GROUP * self.bits // 8
            scale = _aligned(data[:, at:sides]).view(torch.float32).view(-1, 1, 1)
            codes = data[:, sides:end].reshape(len(data) * groups, -1)
            decoded = dequantize(codes, scale, scale, self._scheme, torch.float32)
            target.copy_(decoded.view(len(data), -1)[:, :length])
            at = end
        return values

    @property
    def _scheme(self) -> GroupScheme:
        return GroupScheme(self.bits, GROUP, symmetric=True)


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """A copy: one row of bytes is contiguous wherever it starts, but wider values cannot start just anywhere."""
    return data.clone(memory_format=torch.contiguous_format)


class ErrorFeedback:
    """Remembers what codes lost, and adds it to what is encoded next, so that losses do not add up over steps.

    Args:
        keep: share of the old error that is kept; the rest is the newest loss.
        period: reductions after which the error is forgotten.
    """

    def __init__(self, keep: float, period: int) -> None:
        self.keep, self.period = keep, period
        self._error: torch.Tensor | None = None
        self._age = 0

    def twin(self) -> ErrorFeedback:
        """One with the same settings and nothing to remember."""
        return ErrorFeedback(self.keep, self.period)

    def forget(self) -> None:
        """What was lost is no more to be made up for."""
        self._error, self._age = None, 0

    def compensate(self, rows: torch.Tensor) -> torch.Tensor:
        """Values to encode in place of `rows`."""
        if self._age == self.period:
            self.forget()
        self._age += 1
        return rows if self._error is None else rows + self._error

    def learn(self, meant: torch.Tensor, sent: torch.Tensor) -> None:
        """Take note of what was to be sent, and of what the codes say."""
        lost = (meant.float() - sent).mul_(1.0 - self.keep)
        if self._error is not None:
            lost.add_(self._error, alpha=self.keep)
        # A gradient that overflowed is no error to make up for.
        self._error = lost.nan_to_num_(0.0, 0.0, 0.0).to(meant.dtype)


class QuantizedSum:
    """`flat.reduce_scatter_into` by codes.

    Args:
        codec: of a row.
        feedback: makes up for what codes lose; None lets it go.
    """

    def __init__(self, codec: RowCodec, feedback: ErrorFeedback | None = None) -> None:
        self.codec = codec
        self._feedback = [feedback, None if feedback is None else feedback.twin()]

    def __call__(
        self, shard: torch.Tensor, full: torch.Tensor, axis: Axis, async_op: bool = False
    ) -> flat.Handle:
        """Sum `full` over the axis; each rank gets its slice of the sum. Arguments as of `flat.reduce_scatter_into`."""
        if not full.numel():
            return flat.DONE
        rows = full.detach().view(axis.size, -1)
        node, nodes = (axis, None) if axis.hops is None else axis.hops
        if nodes is not None:
            # to a neighbour go the rows of all ranks at its place
            rows = rows.view(nodes.size, node.size, -1).transpose(0, 1).reshape(axis.size, -1)
        first = self._hop(rows, node, self._feedback[0])

        def finish() -> None:
            total = first()
            if nodes is not None:
                total = self._hop(total.to(full.dtype), nodes, self._feedback[1])()
            shard.detach().copy_(total.view(-1))

        # the rest is done by whoever waits, in one order on all ranks
        return _close(_Pending([], finish), async_op)

    def forget_losses(self) -> None:
        """Make up for nothing that was lost so far: later gradients are on another scale."""
        for feedback in self._feedback:
            if feedback is not None:
                feedback.forget()

    def _hop(
        self, rows: torch.Tensor, axis: Axis, feedback: ErrorFeedback | None
    ) -> Callable[[], torch.Tensor]:
        """Start to send each rank of `axis` its equal share of `rows`; what is returned waits and gives the sum, fp32."""
        meant = rows if feedback is None else feedback.compensate(rows)
        codes = self.codec.encode(meant)
        if feedback is not None:
            feedback.learn(meant, self.codec.decode(codes, rows.dtype))
        arrived = torch.empty_like(codes)
        pending = flat.exchange(arrived.view(-1), codes.view(-1), axis, async_op=True)

        def finish() -> torch.Tensor:
            pending.wait()
            shares = arrived.view(axis.size, -1, arrived.shape[1])
            total = self.codec.decode(shares[0], rows.dtype)
            for share in shares[1:]:
                total += self.codec.decode(share, rows.dtype)
            return total

        return finish
