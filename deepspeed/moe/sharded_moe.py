# SPDX-License-Identifier: Apache-2.0
"""The layer between gate and experts: queues are filled, exchanged, computed, exchanged, emptied."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .ep_kernels import scale_grad
from .gating import (
    Routes,
    gumbel_rsample,
    multiplicative_jitter,
    route_slots,
    top1gating,
    top2gating,
    topkgating,
)
from .mappings import drop_tokens, experts_are_spread, gather_tokens

__all__ = [
    "MOELayer",
    "Routes",
    "TopKGate",
    "_AllToAll",
    "gumbel_rsample",
    "multiplicative_jitter",
    "top1gating",
    "top2gating",
    "topkgating",
]

# Programs ask for it; token dispatch needs no extra package.
TUTEL_INSTALLED = False


class _AllToAll(torch.autograd.Function):
    """Part i of dimension 0 goes to rank i, and part i of the result came from rank i."""

    @staticmethod
    def forward(ctx: Any, group: Any, input: Tensor) -> Tensor:
        ctx.group = group
        sent = input.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _AllToAll.apply(ctx.group, grad)


class TopKGate(nn.Module):
    """A linear gate: scores each token for each expert and routes it to the best `k`.

    Scores are computed in fp32 whatever the dtype of tokens and weight, under autocast too.

    Args:
        model_dim: size of a token.
        num_experts: number of experts on all ranks together.
        k: experts per token.
        capacity_factor: capacity of an expert in training, as a multiple of an even share.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least capacity.
        noisy_gate_policy: None, "Jitter" (noise on the tokens) or "RSample" (noise on the scores,
            top-1 only); in training only.
        drop_tokens: False makes the queues long enough for all.
        use_rts: top-1 keeps random tokens of too many, not the first.
        ep_group: group whose ranks exchange queues.
        top2_2nd_expert_sampling: top-2 draws the second expert.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        ep_group: Any = None,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(
                explain(
                    "a token cannot choose that many experts",
                    got=f"k={k} with {num_experts} experts",
                    expected=f"1 to {num_experts}",
                )
            )
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.ep_group = ep_group
        self.k = k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self.wall_clock_breakdown = False
        self.gate_time = 0.0

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = ep_group

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """Route the tokens.

        Args:
            input: [S, model].
            used_token: [S], 0 for tokens that no expert shall see; top-1 only.
            sparse_routes: return indices instead of dense masks (see `Routes.sparse`).
            use_tutel: the same.

        Returns:
            `(l_aux, combine [S, E, C], dispatch [S, E, C], exp_counts [E])`, or the sparse form.
        """
        with timed(self, "gate_time"):
            logits = self._logits(input)
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            sparse = sparse_routes or use_tutel
            common: dict[str, Any] = {
                "drop_tokens": self.drop_tokens,
                "ep_group": self.ep_group,
                "sparse_routes": sparse,
            }
            if self.k == 1:
                return top1gating(
                    logits,
                    factor,
                    self.min_capacity,
                    used_token=used_token,
                    noisy_gate_policy=self.noisy_gate_policy if self.training else None,
                    use_rts=self.use_rts,
                    **common,
                )
            if self.k == 2:
                sampled = self.top2_2nd_expert_sampling
                common["top2_2nd_expert_sampling"] = sampled
                return top2gating(logits, factor, self.min_capacity, **common)
            return topkgating(logits, self.k, factor, self.min_capacity, **common)

    def _logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            tokens = tokens.float()
            if self.noisy_gate_policy == "Jitter" and self.training:
                tokens = multiplicative_jitter(tokens, device=tokens.device)
            return nn.functional.linear(tokens, self.wg.weight.float())


class MOELayer(nn.Module):
    """Sends tokens to experts, over all ranks of an expert-parallel group, and mixes the results.

    Args:
        gate: a `TopKGate`, or a module that takes the same arguments and returns sparse routes.
        experts: module for [ranks, local experts, capacity, model], as `Experts`.
        ep_group_name: name of the expert-parallel group.
        ep_size: number of its ranks.
        num_local_experts: experts of this rank.
        use_tutel: accepted; the routes are kept as indices in any case.

    Attributes:
        grad_share: what the experts' gradients are multiplied by, and no others: ranks that share the experts add up
            the gradients of all their samples. The engine sets it.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        ep_group_name: str,
        ep_size: int,
        num_local_experts: int,
        use_tutel: bool = False,
    ) -> None:
        super().__init__()
        if use_tutel:
            logger.warning("use_tutel has no effect: token dispatch needs no extra package")
        self.gate = gate
        self.experts = experts
        self.ep_group: Any = None
        self.ep_size = ep_size
        self.ep_group_name = ep_group_name
        self.num_local_experts = num_local_experts
        self.use_tutel = False
        self.grad_share = 1.0
        self.wall_clock_breakdown = False
        self.time_falltoall = 0.0
        self.time_salltoall = 0.0
        self.time_moe = 0.0
        self.l_aux: Tensor | None = None
        self.exp_counts: Tensor | None = None

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = ep_group
        self.gate._set_ep_group(ep_group)

    def forward(self, *input: Tensor, **kwargs: Any) -> Tensor:
        """Apply the chosen experts to each token.

        Args:
            input: tokens [..., model], then optionally the mask `used_token` of the gate.
            kwargs: none are known.

        Returns:
            Tokens of the same shape and dtype. `l_aux` and `exp_counts` become attributes.
        """
        with timed(self, "time_moe"):
            tokens = input[0]
            flat = tokens.reshape(-1, tokens.shape[-1])
            used_token = input[1] if len(input) > 1 else None
            routes = self.gate(flat, used_token, sparse_routes=True)
            self.l_aux, capacity, experts, chosen, places, weights, self.exp_counts = routes
            slots = route_slots(chosen, places, experts, int(capacity))
            queues = fill_queues(flat, slots, experts, int(capacity))
            results = self._compute(queues)
            return empty_queues(results, slots, weights).reshape(tokens.shape)

    def _compute(self, queues: Tensor) -> Tensor:
        """[E, C, model] queues of this rank's tokens -> results in the same places."""
        spread = experts_are_spread()
        if not spread:
            queues = drop_tokens(queues, dim=1)
        if self.ep_size > 1:
            self._require_group()
        capacity, model = queues.shape[1:]
        with timed(self, "time_falltoall"):
            if self.ep_size > 1:
                queues = _AllToAll.apply(self.ep_group, queues)
        queues = scale_grad(queues, 1.0 / self.grad_share)
        results = self.experts(queues.view(self.ep_size, self.num_local_experts, capacity, model))
        results = scale_grad(results, self.grad_share).reshape(
            self.ep_size * self.num_local_experts, capacity, model
        )
        with timed(self, "time_salltoall"):
            if self.ep_size > 1:
                results = _AllToAll.apply(self.ep_group, results)
        return results if spread else gather_tokens(results, dim=1)

    def _require_group(self) -> None:
        if self.ep_group is None:
            raise RuntimeError(
                explain(
                    f"the experts are spread over {self.ep_size} ranks, but their group is not set",
                    fix="Pass the model to deepspeed.initialize, or call the MoE layer's "
                    "set_deepspeed_parallelism() after deepspeed.init_distributed().",
                )
            )


def fill_queues(tokens: Tensor, slots: Tensor, experts: int, capacity: int) -> Tensor:
    """[S, model] tokens -> [E, C, model] queues; places that no token took are zero."""
    chosen, count = slots.shape
    # dropped routes share one more row, which is cut off: no host synchronisation to find them
    queues = tokens.new_zeros(experts * capacity + 1, tokens.shape[-1])
    sources = tokens.expand(chosen, count, -1).reshape(chosen * count, -1)
    queues = queues.index_copy(0, slots.reshape(-1), sources)
    return queues[:-1].view(experts, capacity, -1)


def empty_queues(results: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """[E, C, model] results -> [S, model], each token's weighted sum; zero where all were dropped."""
    rows = results.reshape(-1, results.shape[-1])
    taken = rows.index_select(0, slots.reshape(-1).clamp(max=rows.shape[0] - 1))
    taken = taken.view(*slots.shape, -1)
    # a dropped route has weight 0, but what it read may be infinite
    taken = taken.masked_fill((slots == rows.shape[0]).unsqueeze(-1), 0.0)
    weighted = taken * weights.to(taken.dtype).unsqueeze(-1)
    return weighted[0] if len(weighted) == 1 else weighted.sum(dim=0)


# Names that programs know. `_sparse_decode` also takes the number of tokens, which `slots` tells.
_route_slots = route_slots
_sparse_encode = fill_queues


def _sparse_decode(results: Tensor, slots: Tensor, weights: Any, _: int) -> Tensor:
    rows = weights if isinstance(weights, Tensor) else torch.stack(list(weights))
    return empty_queues(results, slots, rows)


@contextmanager
def timed(module: Any, attribute: str) -> Iterator[None]:
    """Store the milliseconds of the block in `module`, if its `wall_clock_breakdown` is set."""
    if not module.wall_clock_breakdown:
        yield
        return
    accelerator = get_accelerator()
    accelerator.synchronize()
    start = time.perf_counter()
    yield
    accelerator.synchronize()
    setattr(module, attribute, (time.perf_counter() - start) * 1000)
