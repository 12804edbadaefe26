# SPDX-License-Identifier: Apache-2.0
"""Guesses how a model without rules is divided: pairs of column and row layers, by the names that models give them."""

from __future__ import annotations

import re

from torch import nn

from deepspeed.utils.errors import explain

from .autotp_config import PartitionType, TPLayerSpec

# The last layer of an attention or an MLP, which adds up what the others of its module computed.
_ROW = re.compile(
    r"(?:^|\.)(o_proj|out_proj|down_proj|dense_4h_to_h|fc2|fc_out|wo|w2|out_lin|lin2|attn_out|ff_out|c_proj"
    r"|self_attention\.dense|attention\.dense|self_attn\.dense|attn\.dense|output\.dense|ffn\.output)$"
)
# Those before it.
_COLUMN = re.compile(
    r"(?:^|\.)(q_proj|k_proj|v_proj|gate_proj|up_proj|dense_h_to_4h|fc1|fc_in|w1|w3|wi|wi_0|wi_1|q_lin|k_lin|v_lin"
    r"|lin1|query|key|value|intermediate\.dense|ffn\.intermediate)$"
)
# Several weights in one, whose order the name does not tell.
_JOINED = re.compile(
    r"(?:^|\.)(qkv_proj|qkv|c_attn|query_key_value|Wqkv|W_pack|gate_up_proj|in_proj)$"
)
# Norms of a head's width between the two: each rank uses them on its own heads.
_OF_HEADS = re.compile(r"(?:^|\.)(q_norm|k_norm|q_layernorm|k_layernorm)$")


def find_rows(model: nn.Module) -> list[str]:
    """Names of the linear layers that are row-parallel, inside of repeated blocks."""
    return [name for name in _in_blocks(model) if _ROW.search(name)]


def guess_specs(model: nn.Module) -> list[TPLayerSpec]:
    """Rules for a model: for all columns, all rows, and norms of heads; [] where no pair is found.

    A module is divided only if it has both kinds, since half a pair would break the model.

    Raises:
        ValueError: a module holds several weights in one, or other layers of the transposed kind.
    """
    pairs: dict[str, tuple[list[str], list[str]]] = {}
    for name, layer in _in_blocks(model).items():
        column, row, joined = (kind.search(name) for kind in (_COLUMN, _ROW, _JOINED))
        if joined or (row and type(layer).__name__ == "Conv1D"):
            raise ValueError(
                explain(
                    "how this model's layers are divided cannot be guessed",
                    got=f"{name}, which holds several weights in one or is transposed",
                    expected="rules for the model",
                    fix="Name a tensor_parallel.preset_model, or write tensor_parallel.partition_config: 'shape' "
                    "says how joined weights lie.",
                )
            )
        found = row or column
        if found:
            pairs.setdefault(_owner(name, found), ([], []))[bool(row)].append(name)
    whole = {owner: found for owner, found in pairs.items() if all(found)}
    if not whole:
        return []
    kinds = (PartitionType.COLUMN, PartitionType.ROW)
    specs = [
        TPLayerSpec([_exactly(n) for found in whole.values() for n in found[at]], kind)
        for at, kind in enumerate(kinds)
    ]
    norms = [
        _exactly(name)
        for name, _ in model.named_modules()
        if (found := _OF_HEADS.search(name)) and name[: found.start()] in whole
    ]
    shared = TPLayerSpec(norms, PartitionType.SKIP, grad_allreduce=True)
    return [shared, *specs] if norms else specs


def _exactly(name: str) -> str:
    return f"{re.escape(name)}\\.weight$"


def _owner(name: str, found: re.Match[str]) -> str:
    """The module that holds both halves of a pair; BERT's attention puts the first into one of its own, "self"."""
    return name[: found.start()].removesuffix(".self")


def _in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers below the numbered members of module lists."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if re.search(r"(^|\.)\d+\.", name)
        and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
    }
