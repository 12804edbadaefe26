# SPDX-License-Identifier: Apache-2.0
"""Offloading of optimizer states by nodes of a graph: known by name, so that schedules can be checked, and refused."""

from __future__ import annotations

from typing import Any

from deepspeed.utils.errors import explain

from .contract import PassContract
from .zero_1_and_2_compile import NAME_Z1, NAME_Z2

NAME = "offload_adam_states"
NAME_SYNC = "offload_adam_states_sync"
NAME_FOR_INIT = "offload_adam_states_for_init"
_BELOW_3 = frozenset({NAME_Z1, NAME_Z2})
CONTRACT = PassContract(requires=frozenset({"states_away"}), conflicts_with=_BELOW_3 | {NAME_SYNC})
CONTRACT_SYNC = PassContract(conflicts_with=_BELOW_3 | {NAME, NAME_FOR_INIT})
CONTRACT_FOR_INIT = PassContract(
    provides=frozenset({"states_away"}), conflicts_with=_BELOW_3 | {NAME_SYNC}
)


def _refuse() -> NotImplementedError:
    return NotImplementedError(
        explain(
            "the compile passes that offload optimizer states are not built",
            fix="set zero_optimization.offload_optimizer.device to 'cpu', or call engine.offload_states()",
        )
    )


def move_opt_states(*_: Any, **__: Any) -> Any:
    """Refuse.

    Raises:
        NotImplementedError: always.
    """
    raise _refuse()


def move_opt_states_sync(*_: Any, **__: Any) -> Any:
    """Refuse.

    Raises:
        NotImplementedError: always.
    """
    raise _refuse()


def offload_adam_states_for_init(*_: Any, **__: Any) -> Any:
    """Refuse.

    Raises:
        NotImplementedError: always.
    """
    raise _refuse()
