# SPDX-License-Identifier: Apache-2.0
"""How a model stacks its experts' gate and up weights in one tensor, told from the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FusedGateUpLayout:
    """A stacking of gate and up weights.

    Attributes:
        layout: "gate_up_first" ([experts, 2 ffn, hidden]) or "hidden_first" ([experts, hidden, 2 ffn]).
        hidden_size: size of a token.
        ffn_hidden_size: size inside an expert.
        needs_transpose: whether matrices are [in, out], not [out, in] as in `nn.Linear`.
    """

    layout: str
    hidden_size: int
    ffn_hidden_size: int
    needs_transpose: bool


def classify_fused_gate_up_layout(
    gate_up_shape: Sequence[int], down_shape: Sequence[int]
) -> FusedGateUpLayout | None:
    """Tell the layout of two stacked weights by their shapes; None if they are no such pair."""
    if len(gate_up_shape) != 3 or len(down_shape) != 3 or gate_up_shape[0] != down_shape[0]:
        return None
    (_, rows, columns), (_, down_rows, down_columns) = gate_up_shape, down_shape
    if rows == 2 * down_columns and columns == down_rows:
        return FusedGateUpLayout("gate_up_first", columns, down_columns, False)
    if columns == 2 * down_rows and rows == down_columns:
        return FusedGateUpLayout("hidden_first", rows, down_rows, True)
    return None
