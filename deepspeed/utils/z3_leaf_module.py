# SPDX-License-Identifier: Apache-2.0
"""Leaf modules of ZeRO-3: all params below one are gathered together when it is entered.

Needed where the order of submodules depends on the data (experts chosen by a router), or where very many small
submodules would make gathering one by one slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import explain
from .logging import logger

if TYPE_CHECKING:
    from torch import nn

_SHOWN = 5


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this very module is a leaf."""
    return bool(getattr(model, "_z3_leaf", False))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether ZeRO-3 gathers this param as part of a leaf module (known once the engine is made)."""
    return hasattr(model, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules below `model`, itself included, that are leaves."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Make this very module a leaf, or stop it being one."""
    model._z3_leaf = flag  # type: ignore[assignment]


def set_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: Sequence[type | str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Make the modules of some classes leaves. Call it before `deepspeed.initialize`.

    Args:
        model: the module to search, itself included.
        leaf_module_classes: types (their subclasses match too), or names of classes, bare or fully qualified.
        raise_if_not_found: whether finding none is an error.

    Returns:
        The modules found.

    Raises:
        ValueError: none found.
        AssertionError: a class that is neither a type nor a name.

    Example:
        >>> deepspeed.utils.set_z3_leaf_modules(model, ["MixtralSparseMoeBlock"])
    """
    return _set_by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: Sequence[type | str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Undo `set_z3_leaf_modules`; takes, returns and raises the same."""
    return _set_by_class(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module,
    module_names: Sequence[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Make modules leaves by the names that `model.named_modules()` gives them.

    Returns:
        The modules found, and the names that no module has.

    Raises:
        ValueError: none found.
    """
    return _set_by_text(model, module_names, flag, raise_if_not_found, str.__eq__, "named")


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: Sequence[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Make modules leaves by the ends of their names.

    Returns:
        The modules found, and the suffixes that no name ends with.

    Raises:
        ValueError: none found.
    """
    return _set_by_text(
        model, module_name_suffixes, flag, raise_if_not_found, str.endswith, "matching suffixes"
    )


def apply_zero_leaf_module_config(model: nn.Module, leaf_cfg: Any) -> list[nn.Module]:
    """Make the modules leaves that the section `zero_optimization.leaf_module` names.

    Args:
        model: the module to search.
        leaf_cfg: the section (`classes`, `names`, `name_suffixes`); None for none.

    Returns:
        The modules found, each once. What matches nothing is logged, unless it is a default.
    """
    if leaf_cfg is None:
        return []
    found = set_z3_leaf_modules(model, leaf_cfg.classes, raise_if_not_found=False)
    named, unknown = set_z3_leaf_modules_by_name(model, leaf_cfg.names, raise_if_not_found=False)
    ending, unmatched = set_z3_leaf_modules_by_suffix(
        model, leaf_cfg.name_suffixes, raise_if_not_found=False
    )
    if unknown:
        logger.warning(f"zero_optimization.leaf_module.names holds unknown names: {unknown}")
    if unmatched:
        logger.warning(
            f"zero_optimization.leaf_module.name_suffixes holds ends of no name: {unmatched}"
        )
    every = list(dict.fromkeys([*found, *named, *ending]))
    if leaf_cfg.model_fields_set and not every:
        logger.warning("zero_optimization.leaf_module matches no module of the model")
    return every


def _set_by_class(
    model: nn.Module, classes: Sequence[type | str], flag: bool, raise_if_not_found: bool
) -> list[nn.Module]:
    classes = [classes] if isinstance(classes, (type, str)) else list(classes)
    if not all(isinstance(kind, (type, str)) for kind in classes):
        raise AssertionError(
            explain("leaf_module_classes must be a list of types or names", got=repr(classes))
        )
    types = tuple(kind for kind in classes if isinstance(kind, type))
    names = {kind for kind in classes if isinstance(kind, str)}
    found = [
        module
        for module in model.modules()
        if isinstance(module, types) or names & _names_of(type(module))
    ]
    _mark(found, flag)
    if not found and raise_if_not_found:
        raise _not_found(model, "of type", classes)
    return found


def _names_of(kind: type) -> set[str]:
    return {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}


def _set_by_text(
    model: nn.Module,
    texts: Sequence[str],
    flag: bool,
    raise_if_not_found: bool,
    matches: Callable[[str, str], bool],
    how: str,
) -> tuple[list[nn.Module], list[str]]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    modules = list(model.named_modules())
    hits = {text: [m for name, m in modules if matches(name, text)] for text in texts}
    found = list(dict.fromkeys(module for some in hits.values() for module in some))
    _mark(found, flag)
    if not found and raise_if_not_found:
        raise _not_found(model, how, texts)
    return found, [text for text, some in hits.items() if not some]


def _mark(modules: Sequence[nn.Module], flag: bool) -> None:
    for module in modules:
        set_z3_leaf_module(module, flag)


def _not_found(model: nn.Module, how: str, wanted: Sequence[type | str]) -> ValueError:
    kinds = list(dict.fromkeys(type(m).__name__ for m in model.modules()))
    names = [name for name, _ in model.named_modules() if name]
    seen = kinds if how == "of type" else names
    more = f" and {len(seen) - _SHOWN} more" if len(seen) > _SHOWN else ""
    return ValueError(
        explain(
            f"No modules {how} {list(wanted)} found in model {type(model).__name__}",
            expected=f"some of {', '.join(seen[:_SHOWN])}{more}",
        )
    )
