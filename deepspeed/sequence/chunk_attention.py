# SPDX-License-Identifier: Apache-2.0
"""Causal attention between chunks of one sequence, and chunks that wait in host memory.

[Note: Attention chunk by chunk]
Softmax over all keys follows from softmax over some of them and the logarithm of each part's sum, so a query chunk can
meet one key chunk after another (arXiv:2205.14135). The backward pass needs no more than inputs, outputs and the
logarithm of the whole sum. Inside a pair of chunks, too, only some queries' scores exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepspeed.runtime.torch_autocast import without_autocast
from deepspeed.utils.errors import explain

# scores that are held at once: 64 MB in fp32
_SCORES = 1 << 24


class SequenceChunk:
    """A part of a sequence that lives in host memory, with a copy on its device while it is used.

    Args:
        chunk: the values, on the device.
        device: where copies are made; None for where `chunk` is.
        is_in_use: keep `chunk` as the present copy.
    """

    def __init__(
        self, chunk: Tensor, device: torch.device | None = None, is_in_use: bool = False
    ) -> None:
        self.device = torch.device(device) if device is not None else chunk.device
        self.gpu_chunk: Tensor | None = chunk if is_in_use else None
        if self.device.type == "cpu":
            self.cpu_chunk = chunk.to(self.device)
            return
        pinned = self.device.type == "cuda"
        self.cpu_chunk = torch.empty(
            chunk.shape, dtype=chunk.dtype, pin_memory=pinned, device="cpu"
        )
        self.cpu_chunk.copy_(chunk, non_blocking=pinned)  # whoever reads it comes on this stream

    def load_to_gpu(self) -> None:
        """Bring a copy to the device, if there is none."""
        if self.gpu_chunk is None:
            self.gpu_chunk = self.cpu_chunk.to(self.device, non_blocking=True)

    def get_gpu_chunk(self) -> Tensor:
        """The copy on the device.

        Raises:
            AssertionError: there is none.
        """
        self.check_gpu_chunk()
        assert self.gpu_chunk is not None
        return self.gpu_chunk

    def check_gpu_chunk(self) -> None:
        """Raise AssertionError unless there is a copy on the device."""
        if self.gpu_chunk is None:
            raise AssertionError(
                explain("the chunk is in host memory only", fix="Call load_to_gpu() before.")
            )

    def offload(self) -> None:
        """Give up the copy on the device."""
        self.gpu_chunk = None

    def overwrite_to_cpu(self) -> None:
        """Take over what the copy on the device holds now."""
        chunk = self.get_gpu_chunk()
        if chunk.data_ptr() != self.cpu_chunk.data_ptr():
            self.cpu_chunk.copy_(chunk, non_blocking=self.device.type == "cuda")

    def values(self) -> Tensor:
        """The values on the device, without keeping a copy there."""
        if self.gpu_chunk is not None:
            return self.gpu_chunk
        return self.cpu_chunk.to(self.device, non_blocking=True)


@without_autocast
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Queries of one chunk over keys of one.

    Args:
        q: `[batch, kv heads, heads of each, queries, D]`.
        k, v: `[batch, kv heads, 1, keys, D]`.
        scale: of the products.
        causal: the two chunks are the same one, and no query sees later keys.

    Returns:
        The attention's output in fp32 (fp64 for fp64), and each query's log-sum-exp.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    sums = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
    for rows in _tiles(q, k):
        scores, keys = _scores(q, k, rows, scale, causal)
        sums[..., rows] = scores.logsumexp(-1)
        weights = scores.sub_(sums[..., rows, None]).exp_()
        out[..., rows, :] = weights @ v[..., keys, :].to(wide)
    return out, sums


def join(out: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over two sets of keys from those over each."""
    total = torch.logaddexp(sums, more_sums)
    kept = out * (sums - total).exp_()[..., None]
    return kept.addcmul_(more, (more_sums - total).exp_()[..., None]), total


@without_autocast
def attend_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    sums: Tensor,
    product: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one pair of chunks adds to the gradients of its queries, keys and values.

    Args:
        grad: of the whole output of the query chunk.
        inputs: q, k and v as of `attend`.
        sums: log-sum-exp of the queries over all keys.
        product: `(grad * output).sum(-1)`.
        scale, causal: as of `attend`.
    """
    q, k, v = inputs
    wide = torch.promote_types(q.dtype, torch.float32)
    to_q = torch.empty(q.shape, dtype=wide, device=q.device)
    to_k, to_v = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
    for rows in _tiles(q, k):
        scores, keys = _scores(q, k, rows, scale, causal)
        weights = scores.sub_(sums[..., rows, None]).exp_()
        of_out = grad[..., rows, :].to(wide)
        to_v[..., keys, :] += (weights.transpose(-1, -2) @ of_out).sum(2, keepdim=True)
        of_scores = of_out @ v[..., keys, :].to(wide).transpose(-1, -2)
        of_scores.sub_(product[..., rows, None]).mul_(weights).mul_(scale)
        to_q[..., rows, :] = of_scores @ k[..., keys, :].to(wide)
        of_keys = of_scores.transpose(-1, -2) @ q[..., rows, :].to(wide)
        to_k[..., keys, :] += of_keys.sum(2, keepdim=True)
    return to_q, to_k, to_v


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    count = q.shape[-2]
    step = max(1, _SCORES // max(1, q[..., 0, 0].numel() * k.shape[-2]))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def _scores(q: Tensor, k: Tensor, rows: slice, scale: float, causal: bool) -> tuple[Tensor, slice]:
    """Scores of some queries, and the keys that any of them sees."""
    keys = slice(0, rows.stop if causal else k.shape[-2])
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q[..., rows, :].to(wide) * scale) @ k[..., keys, :].to(wide).transpose(-1, -2)
    if causal:
        columns = torch.arange(keys.stop, device=q.device)
        later = columns > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        scores.masked_fill_(later, float("-inf"))
    return scores, keys
