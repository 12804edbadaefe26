# SPDX-License-Identifier: Apache-2.0
"""Offloading of parameters by nodes of a graph: known by name, so that schedules can be checked, and refused."""

from __future__ import annotations

from typing import Any

from deepspeed.utils.errors import explain

from .contract import PassContract

NAME = "offload_parameters"
CONTRACT = PassContract(
    requires=frozenset({"z3"}),
    conflicts_with=frozenset(
        {"offload_adam_states", "offload_adam_states_sync", "offload_adam_states_for_init"}
    ),
)


def offload_parameter_fwd(*_: Any, **__: Any) -> Any:
    """Refuse.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        explain(
            "the compile pass offload_parameters is not built",
            fix="set zero_optimization.offload_param.device to 'cpu': graphs gather from slices in host memory",
        )
    )
