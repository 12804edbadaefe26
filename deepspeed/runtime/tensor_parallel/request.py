# SPDX-License-Identifier: Apache-2.0
"""What was asked of tensor-parallel training, by `tp_model_init` or the configuration, and the ranks that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed import comm as dist
from deepspeed.utils import groups
from deepspeed.utils.errors import explain

from ..config_utils import DtypeEnum

_ON_MODEL = "_ds_tp_request"
_NOT_IN_GROUP = -1  # torch's size of a group that this process is not in
_made_mesh: Any = None


@dataclass(frozen=True)
class TPRequest:
    """One call of `tp_model_init`.

    Attributes:
        tp_size: ranks that share a layer.
        dtype: the model's; None does not say.
        tp_group: their process group; None makes one.
    """

    tp_size: int
    dtype: torch.dtype | None = None
    tp_group: Any = None


def record(model: torch.nn.Module, tp_size: int, dtype: Any, tp_group: Any = None) -> TPRequest:
    """Note what a model is to be divided to; `deepspeed.initialize` does it.

    Raises:
        ValueError: an impossible size, or one that is not the group's.
    """
    if not isinstance(tp_size, int) or tp_size < 1:
        raise ValueError(explain("tp_size is a number of ranks", got=repr(tp_size), expected="1 …"))
    members = tp_size if tp_group is None else dist.get_world_size(group=tp_group)
    if members not in (tp_size, _NOT_IN_GROUP):
        raise ValueError(
            explain(
                "tp_size is not the size of tp_group", got=f"tp_size {tp_size}", expected=members
            )
        )
    asked = DtypeEnum.parse(dtype, "tp_model_init's dtype") if dtype is not None else None
    request = TPRequest(tp_size, asked, tp_group)
    model.__dict__[_ON_MODEL] = request
    _note_training()
    return request


def request_of(model: torch.nn.Module, pending: TPRequest | None) -> TPRequest | None:
    """What was asked for a model or a part of it, else the last call's request."""
    found = (m.__dict__.get(_ON_MODEL) for m in model.modules())
    return next((request for request in found if request is not None), pending)


def merged(config: Mapping[str, Any], request: TPRequest | None, mpu: Any) -> dict[str, Any]:
    """A whole configuration with a request in it.

    Raises:
        ValueError: they contradict each other.
    """
    whole = dict(config)
    if request is None:
        return whole
    section = dict(whole.get("tensor_parallel") or {})
    asked = section.get("autotp_size") or request.tp_size
    if asked != request.tp_size:
        raise ValueError(
            explain(
                "tensor_parallel.autotp_size is not what tp_model_init was given",
                got=f"{asked} in the configuration",
                expected=f"tp_size {request.tp_size}",
            )
        )
    if request.tp_group is not None and mpu is not None:
        raise ValueError(
            explain(
                "tp_model_init provided tp_group, and deepspeed.initialize was given an mpu",
                fix="give one of them",
            )
        )
    configured = _dtype_of(whole)
    if request.dtype is not None and configured not in (None, request.dtype):
        raise ValueError(
            explain(
                "Conflicting dtype for tensor parallelism",
                got=f"{request.dtype} in tp_model_init, {configured} in the configuration",
                expected="one dtype",
            )
        )
    section["autotp_size"] = request.tp_size
    whole["tensor_parallel"] = section
    return whole


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a configuration names; None where it names none."""
    for section, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        values = config.get(section) or {}
        if isinstance(values, Mapping) and values.get("enabled") is True:
            return dtype
    return None


def tensor_ranks(config: Mapping[str, Any], mpu: Any, request: TPRequest | None) -> Any:
    """Make the tensor-parallel groups that a configuration asks for; returns the mpu that knows them.

    Neighbouring ranks share a layer. Without tensor parallelism the caller's `mpu` is returned. Collective.

    Raises:
        ValueError: an mpu or a group places ranks in another way.
    """
    global _made_mesh
    section = config.get("tensor_parallel") or {}
    size = section.get("autotp_size") or 0 if isinstance(section, Mapping) else 0
    if not isinstance(size, int) or size <= 1:
        if mpu is None and _made_mesh is not None and groups.current_mesh() is _made_mesh:
            groups.reset()  # an engine before this one was tensor-parallel, and this one is not
            _made_mesh = None
        return mpu
    _note_training()
    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    mesh = groups.current_mesh()
    _made_mesh = mesh
    if mpu is not None and mpu is not groups:
        theirs = (mpu.get_model_parallel_world_size(), mpu.get_model_parallel_rank())
        _check_place("the mpu's model-parallel size and rank", theirs, (size, mesh.tensor.rank))
    if request is not None and request.tp_group is not None:
        ranks = tuple(dist.get_all_ranks_from_group(request.tp_group))
        _check_place("the ranks of tp_group", ranks, mesh.tensor.ranks)
    return groups


def _note_training() -> None:
    # here, as few engines have layers that are divided
    from deepspeed.module_inject.tp_layer import set_autotp_mode

    set_autotp_mode(training=True)


def _check_place(what: str, got: Any, expected: Any) -> None:
    if tuple(got) != tuple(expected):
        raise ValueError(
            explain(
                f"{what} are not as the configuration's tensor_parallel makes them",
                got=tuple(got),
                expected=f"{tuple(expected)}: neighbouring ranks share a layer",
            )
        )
