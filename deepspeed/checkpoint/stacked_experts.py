# SPDX-License-Identifier: Apache-2.0
"""Experts that are stacked in three weights a layer (AutoEP): one file an expert, or shares of the stack by rank."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..utils.errors import explain
from .format import Universal

WEIGHTS = ("w1", "w2", "w3")
_STACK = re.compile(r"(?P<layer>.+)\.experts\.(?P<weight>w[123])")
_ONE = re.compile(r"(?P<stack>(?P<layer>.+)\.experts\.w[123])\.(?P<expert>\d+)")

Parts = dict[tuple[int, int], "OrderedDict[str, Any]"]


def stacked_names(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Names of all stacked weights that a checkpoint's entries of layers tell of, with the ranks that share them."""
    return {
        f"{entry['expert_key_prefix']}.{weight}": int(entry["ep_size"])
        for entry in entries
        if "expert_key_prefix" in entry
        for weight in WEIGHTS
    }


def split_stacks(
    state: Mapping[str, Any], layers: list[str], first_expert: Callable[[str], int]
) -> tuple[OrderedDict[str, Any], Parts]:
    """Take stacked experts out of a module's state.

    Args:
        state: the module's state dict.
        layers: names of all layers of experts, in the order in which files number them.
        first_expert: gives the global number of a layer's first local expert.

    Returns:
        The state without them, and for each (layer, global expert) its part: 2-D weights whose keys end in that number.
    """
    rest: OrderedDict[str, Any] = OrderedDict()
    parts: Parts = {}
    for key, value in state.items():
        match = _STACK.fullmatch(key)
        if match is None or match["layer"] not in layers:
            rest[key] = value
            continue
        first = first_expert(match["layer"])
        for local, weight in enumerate(value.detach()):
            part = parts.setdefault((layers.index(match["layer"]), first + local), OrderedDict())
            part[f"{key}.{first + local}"] = (
                weight.clone()
            )  # a view would be saved with all of them
    return rest, parts


def stack_of(key: str) -> str:
    """The name of the stack that a weight of an expert's file is of; of one that is in no stack the name itself."""
    match = _ONE.fullmatch(key)
    return key if match is None else match["stack"]


def fill_stacks(
    weights: dict[str, Any], part: Mapping[str, Any], first_expert: Callable[[str], int],
    shapes: Mapping[str, torch.Size],
) -> None:  # fmt: skip
    """Put an expert's weights, as its file holds them, in their places of the stacks.

    Args:
        weights: receives stacks, made where they are not there yet.
        part: an expert's file.
        first_expert: gives the global number of a layer's first local expert.
        shapes: of this rank's stacks.
    """
    for key, value in part.items():
        match = _ONE.fullmatch(key)
        if match is None or match["stack"] not in shapes:
            continue
        name, shape = match["stack"], shapes[match["stack"]]
        place = int(match["expert"]) - first_expert(match["layer"])
        if 0 <= place < shape[0]:
            if name not in weights:
                weights[name] = value.new_empty(shape)
            weights[name][place].copy_(value)


def universal_stack(stack: torch.Tensor) -> dict[str, Any]:
    """What a universal file holds of all experts' weights or states [experts, ...]."""
    return {
        Universal.PARAM: stack,
        Universal.IS_EXPERT: True,
        Universal.NUM_EXPERTS: stack.shape[0],
    }


def check_total(name: str, saved: int, local: int, ranks: int) -> None:
    """Compare the number of saved experts with this run's.

    Raises:
        ValueError: there are more or fewer.
    """
    if saved != local * ranks:
        raise ValueError(
            explain(
                f"the checkpoint has another number of experts in {name}",
                got=f"target_local_experts={local}, checkpoint_local_experts={saved // ranks}, "
                f"with {ranks} ranks that share them",
                fix="load into a model with as many experts",
            )
        )
