# SPDX-License-Identifier: Apache-2.0
"""Which engine trains a parameter. One does at a time: a model that is given to another engine leaves the former.

Trainers do that when they train a second time. The former engine's hooks would otherwise take the gradients that the
new one waits for.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch.utils.weak import WeakIdKeyDictionary

from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .precision import Precision
from .zero.plan import Plan

# parameter -> weak reference to its engine, which its hooks keep alive
_ENGINES: Any = WeakIdKeyDictionary()


def claim(engine: Any) -> None:
    """Note the engine as the one that trains or gathers its module's parameters."""
    if engine.optimizer is None and engine.residency is None:
        return
    own = weakref.ref(engine)
    for param in engine.module.parameters():
        _ENGINES[param] = own


def release_former(model: torch.nn.Module, plan: Plan, precision: Precision) -> None:
    """Take the hooks of engines off whose every parameter is in `model`; they refuse to be used from then on.

    An engine that has other parameters, too, stays as it is.

    Raises:
        ValueError: the model was sharded for stage 3, and `plan` or `precision` want its weights otherwise.
    """
    params = list(model.parameters())
    ours = {id(param) for param in params}
    found = (_ENGINES[param]() for param in params if param in _ENGINES)
    for engine in {id(one): one for one in found if one is not None}.values():
        theirs = list(engine.module.parameters())
        if all(id(param) in ours for param in theirs):
            _refuse_other_shards(engine, plan, precision)
            logger.info("a model was given to another engine; the former one is released")
            engine.destroy()
            engine.forward = engine.backward = engine.step = _refuse
            for param in theirs:
                del _ENGINES[param]


def _refuse_other_shards(former: Any, plan: Plan, precision: Precision) -> None:
    if former.residency is None:
        return
    have = (former.plan.params, former.precision.compute)
    if have != (plan.params, precision.compute):
        raise ValueError(
            explain(
                "the model's parameters are in shards that another engine made",
                got=f"a model of stage 3 in {have[1] or 'its own dtypes'}",
                expected="the same stage and dtype in the second engine",
                fix="build the model again, and load the first engine's checkpoint or save_16bit_model file",
            )
        )


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        explain(
            "this engine no longer trains its model",
            got="a model that was given to deepspeed.initialize again",
            expected="one engine for a model at a time",
            fix="use the newer engine, or give each engine a model of its own (copy.deepcopy)",
        )
    )
