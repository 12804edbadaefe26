# SPDX-License-Identifier: Apache-2.0
"""The mixture-of-experts layer that a model puts where a feed-forward block would be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import log_dist

from .experts import Experts
from .sharded_moe import MOELayer, TopKGate

NOISY_GATE_POLICIES = (None, "None", "Jitter", "RSample")


class MoE(nn.Module):
    """Experts that share the tokens: each token is computed by its `k` best, in copies of `expert`.

    Args:
        hidden_size: size of a token.
        expert: module that maps tokens to tokens; each expert starts as a copy of it.
        num_experts: experts on all ranks together.
        ep_size: number of ranks that the experts are spread over.
        k: experts per token.
        capacity_factor: tokens that an expert takes in training, as a multiple of an even share.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least number of tokens that an expert takes.
        use_residual: add a plain `expert` beside, mixed in by learnt coefficients (PR-MoE).
        noisy_gate_policy: None, "Jitter" or "RSample" (see `TopKGate`).
        drop_tokens: False lets each expert take all tokens that chose it.
        use_rts: of too many tokens keep random ones, not the first (k = 1).
        use_tutel: accepted, without effect.
        enable_expert_tensor_parallelism: experts are split over tensor-parallel ranks as well.
        top2_2nd_expert_sampling: draw the second expert instead of taking the second best (k = 2).

    Raises:
        AssertionError: `ep_size` does not divide `num_experts`, or the noise policy is unknown.

    Example:
        >>> layer = MoE(16, torch.nn.Linear(16, 16), num_experts=4, k=2)
        >>> output, l_aux, exp_counts = layer(torch.randn(2, 8, 16))
        >>> output.shape
        torch.Size([2, 8, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
    ) -> None:
        super().__init__()
        if num_experts % ep_size != 0:
            raise AssertionError(
                f"Number of experts ({num_experts}) should be divisible by "
                f"expert parallel size ({ep_size})"
            )
        if noisy_gate_policy not in NOISY_GATE_POLICIES:
            raise AssertionError(
                explain(
                    f"Unsupported noisy_gate_policy: {noisy_gate_policy}",
                    expected=", ".join(str(policy) for policy in NOISY_GATE_POLICIES),
                )
            )
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            None,
            top2_2nd_expert_sampling,
        )
        experts = Experts(expert, self.num_local_experts, self.expert_group_name)
        self.deepspeed_moe = MOELayer(
            gate, experts, self.expert_group_name, ep_size, self.num_local_experts, use_tutel
        )
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Join the expert-parallel group, making it if it is not there. Collective.

        Args:
            use_data_before_expert_parallel_: put data-parallel neighbours on adjacent ranks, not
                expert-parallel ones.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            if self.ep_size == 1:
                return  # a single process needs no group
            raise RuntimeError(
                explain(
                    f"{self.ep_size} ranks share the experts, but torch.distributed is not set up",
                    fix="Call deepspeed.init_distributed() or deepspeed.initialize() first.",
                )
            )
        from deepspeed.utils import groups

        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            log_dist(f"creating expert-parallel group {self.expert_group_name}", [0])
            if self.enable_expert_tensor_parallelism and groups.mpu is not None:
                groups._create_expert_data_and_model_parallel(
                    self.ep_size,
                    mpu=groups.mpu,
                    use_data_before_expert_parallel_=use_data_before_expert_parallel_,
                )
            else:
                groups._create_expert_and_data_parallel(
                    self.ep_size,
                    use_data_before_expert_parallel_=use_data_before_expert_parallel_,
                )
        self.deepspeed_moe._set_ep_group(groups._get_expert_parallel_group(self.expert_group_name))

    def forward(
        self, hidden_states: Tensor, used_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the tokens.

        Args:
            hidden_states: [..., hidden_size].
            used_token: one number a token, 0 for those that no expert shall see; k = 1 only.

        Returns:
            The computed tokens (shape and dtype as given; zero where an expert was full), the
            load-balancing loss (scalar, fp32) and how many tokens chose each expert (int64).
        """
        output = self.deepspeed_moe(hidden_states, used_token)
        if self.use_residual:
            plain = self.mlp(hidden_states)
            if isinstance(plain, tuple):
                plain = plain[0]  # as in Experts: the bias beside it is not ours to add
            share = torch.softmax(self.coefficient(hidden_states), dim=-1)
            output = output * share[..., 0:1] + plain * share[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts
