# SPDX-License-Identifier: Apache-2.0
"""What serves the public collectives: the base class, and the backend of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .flat import DONE


class Backend:
    """Base of the backends.

    Attributes:
        name: what to call it.
        rank_id: this process's rank.
        world_size: number of processes.
        initialized: whether collectives may be called.
    """

    def __init__(self, name: str = "backend", rank: int = 0, size: int = 1) -> None:
        self.name = name
        self.rank_id = rank
        self.world_size = size
        self.initialized = False

    def is_initialized(self) -> bool:
        """Say whether collectives may be called."""
        return self.initialized

    def new_group(self, ranks: Sequence[int]) -> Any:
        """Make a group of these ranks."""
        raise NotImplementedError

    def init_process_group(self) -> None:
        """Mark the backend as usable."""
        self.initialized = True


def _into(out: Any, tensor: Any) -> None:
    out.detach().copy_(tensor.detach().reshape(out.shape))


def _first(outs: Any, ins: Any) -> None:
    _into(outs[0], ins[0])


# verb -> what it does with its first two arguments when there is one process; None: nothing
_ALONE: dict[str, Callable[[Any, Any], object] | None] = {
    "all_reduce": None,
    "all_reduce_coalesced": None,
    "reduce": None,
    "broadcast": None,
    "broadcast_object_list": None,
    "barrier": None,
    "monitored_barrier": None,
    "all_gather": lambda outs, tensor: _into(outs[0], tensor),
    "all_gather_object": lambda objects, one: objects.__setitem__(0, one),
    "all_gather_into_tensor": _into,
    "all_gather_coalesced": lambda outs, ins: list(map(_into, outs, ins)),
    "reduce_scatter_tensor": _into,
    "reduce_scatter": lambda out, ins: _into(out, ins[0]),
    "all_to_all_single": _into,
    "all_to_all": _first,
    "gather": lambda tensor, outs: _into(outs[0], tensor) if outs else None,
    "scatter": lambda tensor, ins: _into(tensor, ins[0]) if ins else None,
}


class SingleBackend(Backend):
    """One process where torch was built without distributed: collectives copy, or do nothing."""

    def __init__(self) -> None:
        super().__init__("single")
        self.initialized = True

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        if verb not in _ALONE:
            raise AttributeError(f"one process cannot {verb}: there is nobody else")
        action = _ALONE[verb]

        def run(*args: Any, **kwargs: Any) -> Any:
            if action is not None:
                action(args[0], args[1])
            flags = args[1:] if verb == "barrier" else args[2:]  # async_op is the one boolean there
            return DONE if kwargs.get("async_op") or any(flag is True for flag in flags) else None

        return run

    def new_group(self, ranks: Sequence[int]) -> Any:
        return None

    def get_rank(self, group: Any = None) -> int:
        return 0

    def get_world_size(self, group: Any = None) -> int:
        return 1

    def get_global_rank(self, group: Any, group_rank: int) -> int:
        return group_rank

    def get_all_ranks_from_group(self, group: Any = None) -> list[int]:
        return [0]

    def get_world_group(self) -> Any:
        return None

    def get_backend(self, group: Any = None) -> str:
        return "single"

    def destroy_process_group(self, group: Any = None) -> None:
        self.initialized = self.initialized and group is not None
