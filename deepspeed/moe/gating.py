# SPDX-License-Identifier: Apache-2.0
"""Who computes what: each token's experts, its place in their queues, and its share of each result.

Letters of shapes: S tokens, E experts, C places in an expert's queue (its capacity), K experts a
token chooses. Routes are kept as index pairs of K * S entries; the dense [S, E, C] masks of the
GShard paper are made of them only for callers that ask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspeed.utils.errors import explain

DROP_BY_PROBABILITY = "probs"
DROP_BY_POSITION = "position"


@dataclass(frozen=True)
class Routes:
    """What a gate decided.

    Attributes:
        l_aux: load-balancing loss, a scalar that carries gradient.
        capacity: C; a route whose place is C was dropped.
        experts: [K, S] int64, the chosen experts.
        places: [K, S] int64, place in the expert's queue.
        weights: [K, S], the share of the expert's result in the token's; 0 where dropped.
        exp_counts: [E] int64, how many tokens chose each expert, before any was dropped.
    """

    l_aux: Tensor
    capacity: int
    experts: Tensor
    places: Tensor
    weights: Tensor
    exp_counts: Tensor

    def sparse(self) -> tuple[Any, ...]:
        """`(l_aux, C, E, experts, places, weights, exp_counts)`; a dropped route has expert -1 and place 0."""
        head = (self.l_aux, self.capacity, self.exp_counts.numel())
        dropped = self.places >= self.capacity
        experts, places = self.experts.masked_fill(dropped, -1), self.places.masked_fill(dropped, 0)
        return (*head, experts, places, self.weights, self.exp_counts)

    def dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(l_aux, combine [S, E, C], dispatch [S, E, C] bool, exp_counts)`."""
        chosen, tokens = self.weights.shape
        shape = (tokens, self.exp_counts.numel(), self.capacity + 1)
        combine = self.weights.new_zeros(shape)
        at = torch.arange(tokens, device=combine.device).expand(chosen, tokens)
        combine = combine.index_put((at, self.experts, self.places), self.weights)
        combine = combine[..., : self.capacity]
        return self.l_aux, combine, combine.detach().bool(), self.exp_counts

    def output(self, sparse_routes: bool) -> tuple[Any, ...]:
        """The sparse form or the dense one."""
        return self.sparse() if sparse_routes else self.dense()


def route_slots(experts: Any, places: Any, num_experts: int, capacity: int) -> Tensor:
    """The rows that routes take in queues laid end to end.

    Args:
        experts: [K, S] int64 (or K tensors of S), the chosen experts; -1 for a dropped route.
        places: of the same shape, places in the experts' queues; `capacity` or more drops a route, too.
        num_experts: E.
        capacity: C.

    Returns:
        [K, S] int64; E * C where a route was dropped.
    """
    chosen, at = _stacked(experts), _stacked(places)
    dropped = (chosen < 0) | (at >= capacity)
    return (chosen * capacity + at).masked_fill(dropped, num_experts * capacity)


def _stacked(rows: Any) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.stack([row.long() for row in rows])


# - Noise


def multiplicative_jitter(x: Tensor, device: Any, epsilon: float = 1e-2) -> Tensor:
    """`x` times noise that is uniform in [1 - epsilon, 1 + epsilon]; `x` itself when epsilon is 0."""
    if epsilon == 0:
        return x
    noise = torch.rand(x.shape, device=device)
    return x * (noise * (2 * epsilon) + (1 - epsilon)).to(x.dtype)


def gumbel_rsample(shape: Any, device: Any) -> Tensor:
    """Noise of the standard Gumbel distribution, fp32: logits plus it sample from their softmax."""
    limits = torch.finfo(torch.float32)
    uniform = torch.rand(shape, device=device)
    uniform = uniform * (1 - limits.eps - limits.tiny) + limits.tiny
    return -torch.log(-torch.log(uniform))


# - Parts


def queue_length(tokens: int, experts: int, factor: float, min_capacity: int) -> int:
    """C: the even share of an expert times `factor`, rounded up, and at least `min_capacity`."""
    return _shared(max(math.ceil(tokens / experts * factor), int(min_capacity)))


def _probabilities(logits: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.softmax(logits, dim=1, dtype=wide)


def _chosen(indices: Tensor, experts: int) -> Tensor:
    """[S] expert of each token -> [S, E] int64 mask."""
    return torch.nn.functional.one_hot(indices, experts)


def _balance_loss(gates: Tensor, mask: Tensor, chosen: int = 1) -> Tensor:
    """Mean probability times mean load, summed over experts and scaled so that balance gives 1."""
    experts = gates.shape[1]
    return (gates.mean(dim=0) * mask.to(gates.dtype).mean(dim=0)).sum() * (experts / chosen)


def _longest_queue(exp_counts: Tensor, ep_group: Any) -> int:
    """C when nothing is dropped: the longest queue, on any rank of the group that exchanges them."""
    longest = exp_counts.max() if exp_counts.numel() else exp_counts.new_zeros(())
    if ep_group is not None and torch.distributed.get_world_size(ep_group) > 1:
        from deepspeed import comm

        comm.all_reduce(longest, op=comm.ReduceOp.MAX, group=ep_group)
    return _shared(max(1, int(longest)))


def _shared(capacity: int) -> int:
    """C rounded up, so that tensor-parallel ranks can share the places evenly."""
    from .mappings import tensor_parallel_size

    size = tensor_parallel_size()
    return math.ceil(capacity / size) * size


def _keep_best(mask: Tensor, scores: Tensor, capacity: int) -> Tensor:
    """[S, E] mask without the entries beyond the `capacity` highest scores of their expert."""
    tokens = mask.shape[0]
    if capacity >= tokens:
        return mask
    best = torch.topk(scores, capacity, dim=0, sorted=False).indices
    return mask * torch.zeros_like(mask).scatter_(0, best, 1)


def _at(table: Tensor, experts: Tensor) -> Tensor:
    """[S, E] table and [K, S] experts -> [K, S] entries."""
    return table.gather(1, experts.t()).t()


# - Gates


def route_top1(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    *,
    used_token: Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: Any = None,
) -> Routes:
    """Send each token to its likeliest expert, whose probability is the weight of the result.

    Args:
        logits: [S, E].
        capacity_factor: capacity as a multiple of an even share.
        min_capacity: least capacity.
        used_token: [S], 0 for tokens that no expert shall see (padding).
        noisy_gate_policy: "RSample" chooses by logits plus Gumbel noise.
        drop_tokens: False makes the queues long enough for all.
        use_rts: of too many tokens keep random ones, not the first.
        ep_group: group whose ranks exchange queues; they must agree on their length.
    """
    tokens, experts = logits.shape
    gates = _probabilities(logits)
    choice = gates.detach()
    if noisy_gate_policy == "RSample":
        choice = logits.detach() + gumbel_rsample(logits.shape, logits.device)
    indices = choice.argmax(dim=1)
    mask = _chosen(indices, experts)
    if used_token is not None:
        mask = mask * used_token.reshape(-1, 1).to(mask.dtype)
    exp_counts = mask.sum(dim=0)
    l_aux = _balance_loss(gates, mask)

    capacity = queue_length(tokens, experts, capacity_factor, min_capacity)
    if not drop_tokens:
        capacity = _longest_queue(exp_counts, ep_group)
    if use_rts:
        scores = mask * torch.rand(mask.shape, device=mask.device)
        mask = _keep_best(mask, scores, capacity)
    places = (mask.cumsum(dim=0) - 1).gather(1, indices.unsqueeze(1)).t()
    kept = mask.gather(1, indices.unsqueeze(1)).t().bool() & (places < capacity)
    weights = _at(gates, indices.unsqueeze(0)) * kept
    return Routes(
        l_aux, capacity, indices[None], places.masked_fill(~kept, capacity), weights, exp_counts
    )


def route_top2(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    *,
    drop_tokens: bool = True,
    ep_group: Any = None,
    top2_2nd_expert_sampling: bool = True,
) -> Routes:
    """Send each token to two experts; second choices queue behind all first choices.

    Args:
        logits: [S, E].
        capacity_factor: capacity as a multiple of an even share of all 2 * S routes.
        min_capacity: least capacity.
        drop_tokens: False makes the queues long enough for all.
        ep_group: group whose ranks exchange queues; they must agree on their length.
        top2_2nd_expert_sampling: draw the second expert instead of taking the second likeliest.
    """
    tokens, experts = logits.shape
    gates = _probabilities(logits)
    first = gates.argmax(dim=1)
    second_logits = logits.detach().to(gates.dtype)
    if top2_2nd_expert_sampling:
        second_logits = second_logits + gumbel_rsample(logits.shape, logits.device)
    second = second_logits.scatter(1, first.unsqueeze(1), float("-inf")).argmax(dim=1)
    chosen = torch.stack((first, second))
    mask1, mask2 = _chosen(first, experts), _chosen(second, experts)
    l_aux = _balance_loss(gates, mask1)
    exp_counts = (mask1 + mask2).sum(dim=0)
    if drop_tokens:
        capacity = queue_length(tokens, experts, capacity_factor * 2, min_capacity)
    else:
        capacity = _longest_queue(exp_counts, ep_group)
    line1 = mask1.cumsum(dim=0) - 1
    line2 = mask2.cumsum(dim=0) - 1 + mask1.sum(dim=0)
    places = torch.cat((_at(line1, chosen[:1]), _at(line2, chosen[1:])))
    return _normalised(gates, chosen, places, places < capacity, (l_aux, capacity, exp_counts))


def route_topk(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    *,
    drop_tokens: bool = True,
    ep_group: Any = None,
    drop_policy: str = DROP_BY_PROBABILITY,
) -> Routes:
    """Send each token to its `k` likeliest experts, weighted by their renormalised probabilities.

    Args:
        logits: [S, E].
        k: experts per token.
        capacity_factor: capacity as a multiple of an even share of all k * S routes.
        min_capacity: least capacity.
        drop_tokens: False makes the queues long enough for all.
        ep_group: group whose ranks exchange queues; they must agree on their length.
        drop_policy: of too many tokens keep the likeliest ("probs") or the first ("position").

    Raises:
        ValueError: drop_policy is another word.
    """
    if drop_policy not in (DROP_BY_PROBABILITY, DROP_BY_POSITION):
        raise ValueError(
            explain(
                f"Invalid drop_policy: {drop_policy}",
                expected=f"{DROP_BY_PROBABILITY} or {DROP_BY_POSITION}",
            )
        )
    tokens, experts = logits.shape
    gates = _probabilities(logits)
    chosen = torch.topk(gates.detach(), k, dim=1).indices
    mask = torch.zeros(gates.shape, dtype=torch.int64, device=gates.device).scatter_(1, chosen, 1)
    chosen = chosen.t()
    exp_counts = mask.sum(dim=0)
    l_aux = _balance_loss(gates, mask, chosen=k)
    if not drop_tokens:
        capacity = _longest_queue(exp_counts, ep_group)
    else:
        capacity = queue_length(tokens, experts, capacity_factor * k, min_capacity)
        if drop_policy == DROP_BY_PROBABILITY:
            mask = _keep_best(mask, gates.detach() * mask, capacity)
    places = _at(mask.cumsum(dim=0) - 1, chosen)
    kept = _at(mask, chosen).bool() & (places < capacity)
    return _normalised(gates, chosen, places, kept, (l_aux, capacity, exp_counts))


def _normalised(
    gates: Tensor, chosen: Tensor, places: Tensor, kept: Tensor, rest: tuple[Tensor, int, Tensor]
) -> Routes:
    """Routes whose weights are the kept probabilities, scaled to sum to 1 for each token."""
    l_aux, capacity, exp_counts = rest
    weights = _at(gates, chosen) * kept
    weights = weights / weights.sum(dim=0).clamp(min=torch.finfo(gates.dtype).eps)
    places = places.masked_fill(~kept, capacity)
    return Routes(l_aux, capacity, chosen, places, weights, exp_counts)


# - The same, under the names and in the forms that programs know


def top1gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: Tensor | None = None,
    noisy_gate_policy: str | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: Any = None,
    sparse_routes: bool = False,
    use_tutel: bool = False,
) -> tuple[Any, ...]:
    """`route_top1` as `(l_aux, combine, dispatch, exp_counts)`, or `Routes.sparse()` on request."""
    return route_top1(
        logits,
        capacity_factor,
        min_capacity,
        used_token=used_token,
        noisy_gate_policy=noisy_gate_policy,
        drop_tokens=drop_tokens,
        use_rts=use_rts,
        ep_group=ep_group,
    ).output(sparse_routes or use_tutel)


def top2gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    top2_2nd_expert_sampling: bool = True,
    sparse_routes: bool = False,
) -> tuple[Any, ...]:
    """`route_top2` as `(l_aux, combine, dispatch, exp_counts)`, or `Routes.sparse()` on request."""
    return route_top2(
        logits,
        capacity_factor,
        min_capacity,
        drop_tokens=drop_tokens,
        ep_group=ep_group,
        top2_2nd_expert_sampling=top2_2nd_expert_sampling,
    ).output(sparse_routes)


def topkgating(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: Any = None,
    drop_policy: str = DROP_BY_PROBABILITY,
    sparse_routes: bool = False,
) -> tuple[Any, ...]:
    """`route_topk` as `(l_aux, combine, dispatch, exp_counts)`, or `Routes.sparse()` on request."""
    return route_topk(
        logits,
        k,
        capacity_factor,
        min_capacity,
        drop_tokens=drop_tokens,
        ep_group=ep_group,
        drop_policy=drop_policy,
    ).output(sparse_routes)
