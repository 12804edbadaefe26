# SPDX-License-Identifier: Apache-2.0
"""A rank's share of a model's experts, taken out of the model's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils.errors import explain

from .fused_expert_layout import classify_fused_gate_up_layout

FUSED, LISTED = "fused_3d", "module_list"
"""How a model stores experts: stacked in 3-D weights, or one module each."""


def shape_of_source(param: Tensor) -> torch.Size:
    """A parameter's shape, also where ZeRO-3 has sharded it."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


@contextmanager
def whole(params: Sequence[Tensor]) -> Iterator[None]:
    """Have parameters that ZeRO-3 has sharded whole inside; a collective where there are any."""
    if not any(hasattr(param, "ds_id") for param in params):
        yield
        return
    with GatheredParameters(list(params)):
        yield


def copy_of(param: Tensor) -> Tensor:
    """The values of a parameter, in memory of their own."""
    with whole([param]), torch.no_grad():
        return param.detach().clone()


def repack_expert_weights(
    experts: nn.Module, spec: Any, ep_rank: int, ep_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The stacked weights of one rank's experts.

    Args:
        experts: the model's experts.
        spec: a `MoELayerSpec` that says how they are stored.
        ep_rank, ep_size: which share.

    Returns:
        w1 (gate) and w3 (up), [local experts, ffn, hidden], and w2 (down), [local experts, hidden, ffn], in the order
        w1, w2, w3 and in memory of their own.

    Raises:
        ValueError: weights of another layout, or that differ in dtype or device.
    """
    local = spec.num_experts // ep_size
    mine = range(ep_rank * local, (ep_rank + 1) * local)
    with torch.no_grad():
        if spec.expert_storage == FUSED:
            return _from_fused(experts, spec, mine)
        return _from_list(experts, spec, mine)


def _source_names(spec: Any) -> dict[str, Any]:
    return {"w1": spec.expert_w1_name, "w2": spec.expert_w2_name, "w3": spec.expert_w3_name}


def source_params(experts: nn.Module, spec: Any) -> dict[str, list[Tensor]]:
    """The model's parameters behind each of w1, w2 and w3."""
    names = _source_names(spec)
    if spec.expert_storage == FUSED:
        names["w3"] = names["w3"] or names["w1"]
        return {key: [getattr(experts, name)] for key, name in names.items()}
    found: dict[str, list[Tensor]] = {"w1": [], "w2": [], "w3": []}
    for expert in experts.children():
        for key, name in names.items():
            found[key].append(getattr(expert, name).weight)
    return found


def common_requires_grad(experts: nn.Module, spec: Any) -> dict[str, bool]:
    """Whether each of w1, w2 and w3 is trained.

    Raises:
        ValueError: experts differ in it, or in dtype or device.
    """
    found = {}
    for key, params in source_params(experts, spec).items():
        flags = {param.requires_grad for param in params}
        if len(flags) > 1:
            raise _mixed("requires_grad flags", key, spec)
        if len({(param.dtype, param.device) for param in params}) > 1:
            raise _mixed("dtype/device", key, spec)
        found[key] = flags.pop()
    return found


def is_transposed(experts: nn.Module, spec: Any) -> bool:
    """Whether the model's stacked matrices are [in, out]."""
    if spec.expert_storage != FUSED or spec.expert_w3_name is not None:
        return False
    names = (spec.expert_w1_name, spec.expert_w2_name)
    layout = classify_fused_gate_up_layout(
        *(shape_of_source(getattr(experts, name)) for name in names)
    )
    return layout is not None and layout.needs_transpose


def unpack_expert_weights(
    whole: Mapping[str, Tensor], spec: Any, transposed: bool
) -> dict[str, Tensor]:
    """All experts' weights as the model stored them, by their names below its experts.

    Args:
        whole: w1, w2 and w3 of all experts.
        spec: a `MoELayerSpec` that says how they were stored.
        transposed: what `is_transposed` said.
    """
    names = _source_names(spec)
    if spec.expert_storage == LISTED:
        return {
            f"{number}.{name}.weight": whole[key][number].clone()
            for number in range(spec.num_experts)
            for key, name in names.items()
        }
    if names["w3"] is not None:
        return {name: whole[key] for key, name in names.items()}
    found = {names["w1"]: torch.cat([whole["w1"], whole["w3"]], dim=1), names["w2"]: whole["w2"]}
    if transposed:
        found = {name: weight.transpose(1, 2).contiguous() for name, weight in found.items()}
    return found


def _mixed(what: str, key: str, spec: Any) -> ValueError:
    return ValueError(
        explain(
            f"the experts of {spec.moe_module_name} have mixed {what} in {key}, but are stacked in one weight",
            expected="the same for all experts",
            fix="freeze or cast all of them alike before deepspeed.initialize",
        )
    )


def _from_fused(experts: nn.Module, spec: Any, mine: range) -> tuple[Tensor, Tensor, Tensor]:
    gate, down = getattr(experts, spec.expert_w1_name), getattr(experts, spec.expert_w2_name)
    if spec.expert_w3_name is not None:
        up = getattr(experts, spec.expert_w3_name)
        with whole([gate, down, up]):
            w1, w2, w3 = (weight[mine.start : mine.stop].clone() for weight in (gate, down, up))
        return w1, w2, w3
    layout = classify_fused_gate_up_layout(shape_of_source(gate), shape_of_source(down))
    if layout is None:
        raise ValueError(
            explain(
                f"the stacked experts of {spec.moe_module_name} are of an unknown layout",
                got=f"{tuple(shape_of_source(gate))} and {tuple(shape_of_source(down))}",
                expected="[experts, 2 ffn, hidden] and [experts, hidden, ffn], or both transposed",
            )
        )
    with whole([gate, down]):
        both, w2 = (weight[mine.start : mine.stop] for weight in (gate, down))
        if layout.needs_transpose:
            both, w2 = both.transpose(1, 2), w2.transpose(1, 2)
        w1, w3 = both.split(layout.ffn_hidden_size, dim=1)
        # clones of permuted views would keep their strides
        return tuple(w.clone(memory_format=torch.contiguous_format) for w in (w1, w2, w3))  # type: ignore[return-value]


def _from_list(experts: nn.Module, spec: Any, mine: range) -> tuple[Tensor, Tensor, Tensor]:
    params = source_params(experts, spec)
    common_requires_grad(experts, spec)
    kept: dict[str, list[Tensor]] = {key: [] for key in params}
    for number in range(spec.num_experts):
        one = {key: weights[number] for key, weights in params.items()}
        # every rank takes part in gathering every expert, whoever keeps it
        with whole(list(one.values())):
            if number in mine:
                for key, weight in one.items():
                    kept[key].append(weight.detach().clone())
    return torch.stack(kept["w1"]), torch.stack(kept["w2"]), torch.stack(kept["w3"])
