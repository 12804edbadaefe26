# SPDX-License-Identifier: Apache-2.0
"""The layer that AutoEP puts in the place of a model's own: tokens travel to the ranks that hold their experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspeed import comm as dist
from deepspeed.checkpoint.format import Zero
from deepspeed.comm.mesh import Axis
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.moe.ep_kernels import inverse_order, scale_grad, source_to_expert_order
from deepspeed.moe.ep_repack import (
    common_requires_grad,
    copy_of,
    is_transposed,
    repack_expert_weights,
    unpack_expert_weights,
)
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.moe.ep_tp_dispatch import (
    RoutedAssignmentPayload,
    assert_tp_payload_consistent,
    assignment_ordinals_by_expert,
    partition_assignments,
    restore_combined,
)
from deepspeed.utils.errors import explain

from .tp_collectives import sum_of_grads


class SplitPlan(NamedTuple):
    """How many rows go where.

    Attributes:
        input_splits: rows that this rank sends to each.
        output_splits: rows that it gets from each.
        local_counts: [local experts] rows of each of its experts.
        local_counts_by_source: [ranks, local experts] the same by the rank that they come from.
    """

    input_splits: list[int]
    output_splits: list[int]
    local_counts: Tensor
    local_counts_by_source: Tensor


class _Exchange(torch.autograd.Function):
    """Rows to the ranks of their experts; backward, their gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: SplitPlan, group: Any) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return _exchanged(rows, plan.input_splits, plan.output_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = _exchanged(grad, ctx.plan.output_splits, ctx.plan.input_splits, ctx.group)
        return back, None, None


def _exchanged(rows: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
    received = rows.new_empty((sum(got), rows.shape[-1]))
    dist.all_to_all_single(received, rows.contiguous(), got, sent, group)
    return received


def compute_split_plan(
    selected_experts: Tensor, num_experts: int, ep_size: int, num_local_experts: int, ep_group: Any
) -> SplitPlan:
    """Tell all ranks how many rows they get for each of their experts; one exchange.

    Args:
        selected_experts: numbers of the experts of all rows, of any shape.
        num_experts: experts of all ranks together.
        ep_size, num_local_experts: ranks, and experts of each.
        ep_group: the ranks' process group.
    """
    counts = count_tokens_per_expert(selected_experts, num_experts)
    if ep_size == 1:
        total = [int(selected_experts.numel())]
        return SplitPlan(total, list(total), counts, counts.view(1, -1))
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=ep_group)
    by_source = received.view(ep_size, num_local_experts)
    sent = counts.view(ep_size, num_local_experts)
    splits = torch.stack([sent.sum(dim=1), by_source.sum(dim=1)]).tolist()
    return SplitPlan(splits[0], splits[1], by_source.sum(dim=0), by_source)


def compute_split_plan_from_expert_indices(
    expert_indices: Tensor, num_experts: int, ep_size: int, num_local_experts: int, ep_group: Any
) -> SplitPlan:
    """`compute_split_plan` for rows that were chosen among all of a token."""
    return compute_split_plan(expert_indices, num_experts, ep_size, num_local_experts, ep_group)


def resolve_score_apply_mode(spec: Any, mode: str) -> str:
    """Whether scores multiply what goes into experts ("pre") or what comes out ("post"); "auto" is the family's."""
    return str(spec.score_apply if mode == "auto" else mode)


def apply_scores_before_experts_if_enabled(
    rows: Tensor, scores: Tensor, score_apply: str
) -> Tensor:
    """Rows [T, dim] times their scores [T], where these are applied first."""
    if score_apply != "pre":
        return rows
    return (rows.float() * scores.reshape(-1, 1)).to(rows.dtype)


def combine_from_routed(
    expert_output: Tensor,
    top_scores: Tensor,
    token_indices_sorted: Tensor,
    top_k: int,
    score_apply: str,
    combine_impl: str,
    shape: tuple[int, ...],
) -> Tensor:
    """Add up the results of each token's experts.

    Args:
        expert_output: [N * top_k, dim], sorted by expert.
        top_scores: [N, top_k].
        token_indices_sorted: place of each row in the flattened [N, top_k].
        top_k: experts of a token.
        score_apply: "post" multiplies the results by the scores.
        combine_impl: "legacy_bmm" for one product of matrices a token, else a sum.
        shape: of the result.
    """
    places = inverse_order(token_indices_sorted)
    rows = expert_output.index_select(0, places).view(-1, top_k, expert_output.shape[-1])
    if score_apply != "post":
        return rows.sum(dim=1).view(shape)
    scores = top_scores.view(-1, top_k)
    if scores.dtype != torch.float64:
        scores = scores.float()
    if combine_impl == "legacy_bmm":
        mixed = torch.bmm(scores.unsqueeze(1), rows.to(scores.dtype)).squeeze(1)
    else:
        mixed = (rows * scores.unsqueeze(-1)).sum(dim=1)
    return mixed.to(expert_output.dtype).view(shape)


class AutoEPMoELayer(nn.Module):
    """A layer of experts, of which each rank holds a share; its results are those of the layer that it replaces.

    Args:
        spec: the replaced layer.
        source: the replaced layer itself, whose weights are taken over.
        ep_size, ep_rank: ranks that share the experts, and this one's place among them.
        config: the settings of section `expert_parallel`.

    Raises:
        ValueError: a bias that balances the load is asked for; experts differ in dtype, device or `requires_grad`.
    """

    def __init__(
        self, spec: Any, source: nn.Module, ep_size: int, ep_rank: int, config: Any
    ) -> None:
        super().__init__()
        if config.load_balance_coeff is not None and not spec.supports_expert_bias:
            raise ValueError(
                explain(
                    f"the family {spec.model_family} does not support load_balance_coeff/expert_bias",
                    got=config.load_balance_coeff,
                    fix="leave load_balance_coeff null",
                )
            )
        self._is_autoep_layer = True
        self.spec = spec
        self.num_experts, self.num_local_experts = spec.num_experts, spec.num_experts // ep_size
        self.top_k, self.hidden_size = spec.top_k, spec.hidden_size
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.ep_group_name = self.expert_group_name = f"ep_size_{ep_size}"
        self.ep_group: Any = None
        self.tp_group: Any = None
        self.folding_group_handles: Any = None
        self.validate_folding_routing = bool(config.validate_folding_routing)
        self.score_apply = resolve_score_apply_mode(spec, config.score_apply)
        self.combine_impl = config.combine_impl
        self.jitter_noise = float(getattr(source, "jitter_noise", 0.0) or 0.0)
        self.router = _router_of(spec, getattr(source, spec.router_name))
        self.experts = _experts_of(
            spec, getattr(source, spec.experts_name), ep_rank, ep_size, config
        )
        self._transposed = is_transposed(getattr(source, spec.experts_name), spec)
        self.shared_experts_name = spec.shared_experts_name if spec.has_shared_experts else ""
        self.shared_experts_gate_name = spec.shared_experts_gate_name
        for name in (self.shared_experts_name, self.shared_experts_gate_name):
            if name:
                setattr(self, name, getattr(source, name))
        self._mark_params()

    def _mark_params(self) -> None:
        for param in self.experts.parameters():
            param.allreduce = False
            param.group_name = self.ep_group_name
            param.ds_zero_placement_family = Zero.EXPERT_FAMILY
            param.ds_zero_partition_group_name = self.ep_group_name
        for param in self.router.parameters():
            param.ds_zero_placement_family = Zero.REPLICATED_FAMILY
            param.ds_zero_partition_group_name = None

    def set_deepspeed_parallelism(
        self,
        use_data_before_expert_parallel_: bool = False,
        folding_group_handles: Any = None,
    ) -> None:
        """Join the ranks that share the experts; their groups are made by the engine before.

        Args:
            use_data_before_expert_parallel_: how those groups were made.
            folding_group_handles: the groups, where tensor-parallel ranks share experts as well.
        """
        if folding_group_handles is not None:
            self.folding_group_handles = folding_group_handles
            self.tp_group = folding_group_handles.tp_group
            self.ep_group = folding_group_handles.ep_group
            self.ep_group_name = self.expert_group_name = folding_group_handles.ep_group_name
            self._mark_params()
        elif self.ep_group is None and self.ep_size > 1:
            from deepspeed.utils import groups

            self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)
        if self.ep_group is not None and dist.get_rank(group=self.ep_group) != self.ep_rank:
            raise RuntimeError(
                explain(
                    f"{self.spec.moe_module_name} holds another rank's experts",
                    got=f"those of place {self.ep_rank}",
                    expected=f"place {dist.get_rank(group=self.ep_group)} in {self.ep_group_name}",
                )
            )

    def forward(self, hidden_states: Tensor) -> Any:
        """Compute tokens.

        Args:
            hidden_states: [..., hidden].

        Returns:
            The same shape and dtype; with `spec.return_router_logits` and the logits [N, experts] beside.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.training and self.jitter_noise > 0:
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            tokens = tokens * torch.empty_like(tokens).uniform_(low, high)
        scores, chosen, logits = self.router(tokens, with_logits=True)
        handles = self.folding_group_handles
        folded = handles is not None and handles.spec.tp_size > 1
        routed = (self._folded if folded else self._routed)(tokens, scores, chosen)
        output = routed.view(hidden_states.shape)
        if self.shared_experts_name:
            output = output + self._shared(tokens).view(hidden_states.shape)
        return (output, logits) if self.spec.return_router_logits else output

    def _routed(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        order = torch.argsort(chosen.reshape(-1), stable=True)
        rows = tokens.index_select(0, order // self.top_k)
        if self.score_apply == "pre":
            by_row = scores.reshape(-1).index_select(0, order)
            rows = apply_scores_before_experts_if_enabled(rows, by_row, "pre")
        results = self._compute(rows, chosen)
        return combine_from_routed(
            results,
            scores,
            order,
            self.top_k,
            self.score_apply,
            self.combine_impl,
            tuple(tokens.shape),
        )

    def _compute(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Rows that are sorted by expert, through their experts wherever these are."""
        plan = compute_split_plan(
            chosen, self.num_experts, self.ep_size, self.num_local_experts, self._group()
        )
        if self.ep_size == 1:
            return self.experts(rows, plan.local_counts)
        there = _Exchange.apply(rows, plan, self.ep_group)  # type: ignore[no-untyped-call]
        order = source_to_expert_order(plan.local_counts_by_source)
        results = self.experts(there.index_select(0, order), plan.local_counts)
        results = results.index_select(0, inverse_order(order))
        reverse = SplitPlan(plan.output_splits, plan.input_splits, *plan[2:])
        return _Exchange.apply(results, reverse, self.ep_group)  # type: ignore[no-untyped-call,no-any-return]

    def _folded(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Tensor-parallel ranks have the same tokens: each sends a part of the rows, and all get the sum.

        The restored rows' gradients are added up over these ranks, all of which have the whole gradient: so it counts
        once, divided by their number. What each rank's part gives to tokens and scores is added up over them.
        """
        axis = Axis.of_group(self.tp_group)
        tokens, scores = sum_of_grads(tokens, axis), sum_of_grads(scores, axis)
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        experts = flat.index_select(0, order)
        by_row = scores.reshape(-1).index_select(0, order)
        none = torch.zeros_like(experts, dtype=torch.bool)
        payload = RoutedAssignmentPayload(
            token_indices=order // self.top_k,
            expert_indices=experts,
            assignment_indices=assignment_ordinals_by_expert(experts),
            capacity_slots=order % self.top_k,
            combine_weights=by_row if self.score_apply == "post" else torch.ones_like(by_row),
            drop_mask=none,
            pad_mask=none,
            input_splits=[],
            output_splits=[],
            extra={
                "destination_ranks": experts // self.num_local_experts,
                "num_tokens": len(tokens),
            },
        )
        if self.validate_folding_routing:
            assert_tp_payload_consistent(payload, tp_group=self.tp_group, tp_size=axis.size)
        local, context = partition_assignments(
            payload, tp_group=self.tp_group, tp_rank=axis.rank, tp_size=axis.size
        )
        rows = tokens.index_select(0, local.token_indices)
        if self.score_apply == "pre":
            mine = by_row.index_select(0, context.local_indices)
            rows = apply_scores_before_experts_if_enabled(rows, mine, "pre")
        results = self._compute(rows, local.expert_indices)
        restored = restore_combined(results, context, tp_group=self.tp_group)
        return scale_grad(restored, 1.0 / axis.size)

    def _shared(self, tokens: Tensor) -> Tensor:
        output: Tensor = getattr(self, self.shared_experts_name)(tokens)
        if self.shared_experts_gate_name:
            gate = getattr(self, self.shared_experts_gate_name)
            output = torch.sigmoid(gate(tokens)) * output
        return output

    def source_weights(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """All experts' weights (w1, w2, w3) as the replaced layer stored them, by their names below its experts."""
        return unpack_expert_weights(whole, self.spec, self._transposed)

    def _group(self) -> Any:
        if self.ep_size > 1 and self.ep_group is None:
            raise RuntimeError(
                explain(
                    f"the experts are spread over {self.ep_size} ranks, but their group is not set",
                    fix="pass the model to deepspeed.initialize",
                )
            )
        return self.ep_group

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"experts {self.num_local_experts} of {self.num_experts}, top_k={self.top_k}"


def _router_of(spec: Any, source: nn.Module) -> TokenChoiceTopKRouter:
    weight = source.weight
    with torch.device("meta"):
        router = TokenChoiceTopKRouter(
            spec.hidden_size,
            spec.num_experts,
            spec.num_expert_groups,
            spec.num_limited_groups,
            spec.top_k,
            spec.score_func,
            spec.route_norm,
            spec.route_scale,
            spec.gate_bias,
        )
    router.masked_score = spec.masked_score
    router.scores_in_logits_dtype = spec.scores_in_logits_dtype
    router.gate.in_fp32 = spec.logits_in_fp32
    router.gate.weight = nn.Parameter(copy_of(weight), requires_grad=weight.requires_grad)
    if spec.gate_bias:
        bias = source.bias
        router.gate.bias = nn.Parameter(copy_of(bias), requires_grad=bias.requires_grad)
    correction = getattr(source, "e_score_correction_bias", None)
    if isinstance(correction, nn.Parameter):
        del router.e_score_correction_bias  # a buffer so far
        trained = correction.requires_grad
        router.e_score_correction_bias = nn.Parameter(copy_of(correction), requires_grad=trained)
    elif correction is not None:
        router.e_score_correction_bias = copy_of(correction)
    return router


def _experts_of(
    spec: Any, source: nn.Module, ep_rank: int, ep_size: int, config: Any
) -> GroupedExperts:
    trained = common_requires_grad(source, spec)
    weights = repack_expert_weights(source, spec, ep_rank, ep_size)
    local = spec.num_experts // ep_size
    with torch.device("meta"):
        experts = GroupedExperts(
            spec.hidden_size,
            spec.ffn_hidden_size,
            local,
            config.use_grouped_mm and not config.disable_triton_grouped_mm,
            _activation(source, config),
        )
    for key, weight in zip(("w1", "w2", "w3"), weights, strict=True):
        setattr(experts, key, nn.Parameter(weight, requires_grad=trained[key]))
    return experts


def _activation(experts: nn.Module, config: Any) -> Any:
    """The function inside the experts: the settings', else the model's own, else SiLU (None)."""
    if config.expert_activation is not None:
        from torch.nn import functional

        named = getattr(functional, config.expert_activation, None)
        if named is None:
            raise ValueError(
                explain(
                    "unknown expert_parallel.expert_activation",
                    got=config.expert_activation,
                    expected="the name of a function of torch.nn.functional, such as silu or gelu",
                )
            )
        return named
    holder = experts if hasattr(experts, "act_fn") else next(iter(experts.children()), None)
    return getattr(holder, "act_fn", None)


__all__ = [
    "AutoEPMoELayer",
    "SplitPlan",
    "apply_scores_before_experts_if_enabled",
    "combine_from_routed",
    "compute_split_plan",
    "compute_split_plan_from_expert_indices",
    "resolve_score_apply_mode",
]
