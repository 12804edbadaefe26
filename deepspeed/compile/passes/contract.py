# SPDX-License-Identifier: Apache-2.0
"""What passes need of each other, checked before a schedule runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspeed.utils.errors import DeepSpeedError, explain

_pass_contracts: dict[str, PassContract] = {}


class PassContractError(DeepSpeedError, ValueError):
    """A schedule breaks the contract of one of its passes."""


@dataclass(frozen=True)
class PassContract:
    """What a pass is to other passes of the same step.

    Attributes:
        provides: words for what it does to the graph.
        requires: words that passes before it must provide.
        conflicts_with: names of passes that must not be there, before or after it.
    """

    provides: frozenset[str] = field(default_factory=frozenset)
    requires: frozenset[str] = field(default_factory=frozenset)
    conflicts_with: frozenset[str] = field(default_factory=frozenset)


def register_pass_contract(name: str, contract: PassContract | None) -> None:
    """Give a pass its contract; None takes an earlier one away."""
    if contract is None:
        _pass_contracts.pop(name, None)
    else:
        _pass_contracts[name] = contract


def get_pass_contract(name: str) -> PassContract | None:
    """The contract of a pass; None if it has none."""
    return _pass_contracts.get(name)


def validate_schedule(
    schedule: Iterable[tuple[int, Iterable[Any]]],
    name_registry: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Check each step of a schedule by itself: graphs are compiled anew at each, from what was traced.

    Args:
        schedule: `(step, passes)`; a pass is a name or a function.
        name_registry: the functions by name.

    Raises:
        PassContractError: if a requirement is not met, passes conflict, or a function has several names.
    """
    for step, passes in schedule:
        names = [_name_of(each, name_registry or {}) for each in passes]
        provided: set[str] = set()
        for name in names:
            contract = _pass_contracts.get(name or "", PassContract())
            _check_conflicts(step, name, contract, names)
            if lacking := contract.requires - provided:
                raise PassContractError(
                    explain(
                        f"pass {name!r} requires {sorted(lacking)}, which no pass before it provides",
                        got=f"step {step}: {names}",
                        fix="put the pass that provides it in front, in the same step",
                    )
                )
            provided |= contract.provides


def _check_conflicts(
    step: int, name: str | None, contract: PassContract, names: list[str | None]
) -> None:
    for other in names:
        if other is not None and other != name and other in contract.conflicts_with:
            raise PassContractError(
                explain(
                    f"pass {name!r} conflicts with pass {other!r}",
                    got=f"step {step}: {names}",
                    fix="take one of the two out of the schedule",
                )
            )


def _name_of(each: Any, registry: Mapping[str, Callable[..., Any]]) -> str | None:
    if isinstance(each, str):
        return each
    names = [name for name, function in registry.items() if function is each]
    if len(names) > 1:
        raise PassContractError(
            explain(
                "a pass of a schedule is registered under multiple names, so its contract is not known",
                got=f"{each!r}, known as {names}",
                fix="write its name in the schedule",
            )
        )
    return names[0] if names else None
