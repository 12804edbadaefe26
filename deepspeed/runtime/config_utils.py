# SPDX-License-Identifier: Apache-2.0
"""The base of every config model, and the small tools with which configurations are read and shown."""

from __future__ import annotations

import collections
import difflib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from ..utils.errors import explain
from ..utils.logging import logger
from .config_errors import ConfigAssertionError, ConfigTypeError, ConfigValueError

AUTO = "auto"
# Its default is the word itself, so dropping it would lose nothing but the deprecation warning.
_AUTO_IS_A_VALUE = frozenset({"replace_method"})


def is_auto(value: object) -> bool:
    """Tell whether ``value`` is the placeholder ``"auto"`` that integrations fill in."""
    return isinstance(value, str) and value == AUTO


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word most like ``word``, or None when none is close (ratio >= cutoff)."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def deprecated(
    new_param: str | None = None,
    *,
    convert: Any = None,
    set_new: bool = True,
    message: str = "",
) -> dict[str, Any]:
    """Mark a field as deprecated; pass the result as ``json_schema_extra``.

    Args:
        new_param: dotted path of the field that takes over, if there is one.
        convert: turns the old value into the new one.
        set_new: whether the new field is really set (False: only a hint in the warning).
        message: further words for the warning.
    """
    return {
        "deprecated": True,
        "deprecated_msg": message,
        "new_param": new_param,
        "new_param_fn": convert or (lambda value: value),
        "set_new_param": set_new,
    }


class DeepSpeedConfigModel(BaseModel):
    """Base of all config sections: unknown keys are errors, ``"auto"`` means the default.

    Args:
        strict: keep ``"auto"`` values instead of dropping them.
        **data: the section's keys, by field name or alias.

    Raises:
        pydantic.ValidationError: a key is unknown (the nearest known one is named) or a value does not fit.
        AssertionError: a deprecated key and its successor are both given.
    """

    model_config = ConfigDict(
        validate_default=True,
        validate_assignment=True,
        use_enum_values=True,
        populate_by_name=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    def __init__(self, /, strict: bool = False, **data: Any) -> None:
        if not strict:
            data = {k: v for k, v in data.items() if k in _AUTO_IS_A_VALUE or not is_auto(v)}
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _with_hints(type(self), error) from None
        self._retire_deprecated()

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return every key that a user may write: field names and aliases."""
        fields = cls.model_fields
        return [*fields, *(f.alias for n, f in fields.items() if f.alias and f.alias != n)]

    def _retire_deprecated(self) -> None:
        for name in [n for n in type(self).model_fields if n in self.model_fields_set]:
            extra = type(self).model_fields[name].json_schema_extra
            if isinstance(extra, dict) and extra.get("deprecated"):
                self._retire(name, extra)

    def _retire(self, name: str, extra: Mapping[str, Any]) -> None:
        """Warn about one deprecated field, move its value to its successor, take it away."""
        successor = extra.get("new_param")
        words = [f"Config parameter {name} is deprecated"]
        words += [f"use {successor} instead"] if successor else []
        words += [extra["deprecated_msg"]] if extra.get("deprecated_msg") else []
        logger.warning(" ".join(words))
        value = getattr(self, name)
        self.__dict__.pop(name)
        self.model_fields_set.discard(name)
        if not successor or not extra.get("set_new_param", True):
            return
        *path, last = str(successor).split(".")
        owner: Any = self
        for step in path:
            owner = getattr(owner, step)
        if last in owner.model_fields_set:
            raise ConfigAssertionError(
                f"Cannot provide deprecated parameter '{name}' and replacing parameter "
                f"'{successor}' together: remove '{name}'."
            )
        setattr(owner, last, extra["new_param_fn"](value))


def _with_hints(cls: type[DeepSpeedConfigModel], error: ValidationError) -> ValidationError:
    """Name the nearest known key beside each unknown one. Nested models have done so themselves."""
    problems = error.errors(include_url=False)
    if not any(_is_bare(problem) for problem in problems):
        return error
    details = []
    for problem in problems:
        text = problem["msg"]
        if _is_bare(problem):
            key = str(problem["loc"][0])
            guess = nearest(key, cls.known_keys())
            hint = f"did you mean '{guess}'?" if guess else "no such key; remove it."
            text = f"{text}: unknown key '{key}', {hint}"
        kind = PydanticCustomError(problem["type"], _verbatim(text))
        details.append(InitErrorDetails(type=kind, loc=problem["loc"], input=problem["input"]))
    return ValidationError.from_exception_data(error.title, details)


def _is_bare(problem: Any) -> bool:
    """Tell whether pydantic itself reports an unknown key of this very model."""
    own = problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1
    return own and "unknown key" not in problem["msg"]


def _verbatim(text: str) -> Any:
    # pydantic types the template as a LiteralString; ours carries the user's own key.
    return text


class PlainSection(DeepSpeedConfigModel):
    """A section that ignores unknown keys, as the dialect always did, but says which known key is close."""

    model_config = ConfigDict(extra="ignore")

    section: ClassVar[str] = ""
    """Key of the section in the whole configuration; empty when it is nested deeper."""

    def __init__(self, param_dict: Mapping[str, Any] | None = None, /, **data: Any) -> None:
        """Build from the section's keys, or from a whole configuration given as ``param_dict``."""
        if param_dict is not None:
            data = {**section_of(param_dict, self.section), **data}
        warn_of_typing_slips(data, self.known_keys(), self.section)
        super().__init__(**data)

    @classmethod
    def of(cls, param_dict: Mapping[str, Any]) -> Self:
        """Parse this section of a whole configuration."""
        return cls(**section_of(param_dict, cls.section))


class OpenSection(PlainSection):
    """A section that keeps unknown keys for whoever reads the resulting dictionary."""

    model_config = ConfigDict(extra="allow")


def warn_of_typing_slips(data: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    """Log a warning for each ignored key that is nearly a known one.

    Dotted keys are left alone: integrations write them on purpose.
    """
    names = set(known)
    for key in data:
        if not isinstance(key, str) or key in names or "." in key:
            continue
        guess = nearest(key, names, cutoff=0.84)
        if guess is not None and guess not in data:
            place = f" in '{where}'" if where else ""
            logger.warning(
                f"Config key '{key}'{place} is unknown and ignored; did you mean '{guess}'?"
            )


def section_of(param_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return section ``name`` as a dictionary; a missing or null section is an empty one.

    Raises:
        TypeError: (as ``ConfigTypeError``) the section is not a JSON object.
    """
    value = param_dict.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigTypeError(
            explain(
                f"config section '{name}' has the wrong type",
                got=f"{value!r} ({type(value).__name__})",
                expected="a JSON object",
            )
        )
    return dict(value)


class DtypeEnum(Enum):
    """The dtypes a configuration can name; ``DtypeEnum("half")`` and ``DtypeEnum(torch.half)`` both work."""

    fp16 = torch.float16, "torch.float16", "fp16", "float16", "half"
    fp32 = torch.float32, "torch.float32", "fp32", "float32", "float"
    bf16 = torch.bfloat16, "torch.bfloat16", "bf16", "bfloat16", "bfloat"
    int8 = torch.int8, "torch.int8", "int8"

    _spellings: tuple[Any, ...]

    def __new__(cls, dtype: torch.dtype, *names: str) -> DtypeEnum:
        member = object.__new__(cls)
        member._value_ = dtype
        member._spellings = (dtype, *names)
        return member

    @classmethod
    def _missing_(cls, value: object) -> DtypeEnum | None:
        return next((member for member in cls if value in member._spellings), None)

    @classmethod
    def parse(cls, value: Any, key: str) -> torch.dtype:
        """Return the torch dtype that ``value`` names.

        Raises:
            ValueError: (as ``ConfigValueError``) no dtype has that name; ``key`` is said in the message.
        """
        try:
            return cls(value).value
        except ValueError:
            names = [name for member in cls for name in member._spellings[2:]]
            message = explain(f"'{key}' is not a dtype", got=repr(value), expected=", ".join(names))
            raise ConfigValueError(message) from None


def get_scalar_param(param_dict: Mapping[str, Any], param_name: str, default: Any) -> Any:
    """Return ``param_dict[param_name]``, or ``default`` when it is absent."""
    return param_dict.get(param_name, default)


def get_list_param(param_dict: Mapping[str, Any], param_name: str, default: Any) -> Any:
    """Return ``param_dict[param_name]``, or ``default`` when it is absent."""
    return param_dict.get(param_name, default)


def get_dict_param(param_dict: Mapping[str, Any], param_name: str, default: Any) -> Any:
    """Return ``param_dict[param_name]``, or ``default`` when it is absent."""
    return param_dict.get(param_name, default)


def get_config_default(config: type[BaseModel], field_name: str) -> Any:
    """Return the default of one field of a model.

    Raises:
        ValueError: (as ``ConfigValueError``) the model has no such field, or the field has no default.
    """
    field = config.model_fields.get(field_name)
    if field is None or field.is_required():
        what = f"{config.__name__} has no default for '{field_name}'"
        raise ConfigValueError(explain(what, expected=", ".join(config.model_fields)))
    return field.get_default(call_default_factory=True)


def dict_raise_error_on_duplicate_keys(ordered_pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Build a dictionary from a parser's pairs; use it as ``object_pairs_hook``.

    Raises:
        ValueError: (as ``ConfigValueError``) a key occurs twice, which JSON parsers would let pass.
    """
    pairs = list(ordered_pairs)
    built = dict(pairs)
    if len(built) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        raise ConfigValueError(f"Duplicate keys in DeepSpeed config: {twice}")
    return built


class pp_int(int):
    """An int that prints with thousands separators, or as ``custom_print_str`` when given."""

    custom_print_str: str | None

    def __new__(cls, val: float, custom_print_str: str | None = None) -> pp_int:
        """Make the number; ``custom_print_str`` replaces its printed form."""
        made = super().__new__(cls, val)
        made.custom_print_str = custom_print_str
        return made

    def __repr__(self) -> str:
        return self.custom_print_str or f"{int(self):,}"


class ScientificNotationEncoder(json.JSONEncoder):
    """Encodes JSON with numbers above 1000 as 1.000000e+03, indented by four blanks a level."""

    def iterencode(self, o: Any, _one_shot: bool = False, level: int = 0) -> Any:
        """Return the text of ``o`` in one piece."""
        pad = "\n" + " " * 4 * (level + 1)
        end = "\n" + " " * 4 * level
        if isinstance(o, bool) or o is None:
            return json.dumps(o)
        if isinstance(o, (int, float)):
            return f"{o:e}" if o > 1e3 else json.dumps(o)
        if isinstance(o, Mapping):
            rows = [
                f"{json.dumps(str(k))}: {self.iterencode(v, level=level + 1)}" for k, v in o.items()
            ]
            return f"{{{pad}{f', {pad}'.join(rows)}{end}}}" if rows else "{}"
        if isinstance(o, (list, tuple)):
            return f"[{', '.join(self.iterencode(v, level=level + 1) for v in o)}]"
        return json.dumps(o if isinstance(o, str) else str(o))

    def encode(self, o: Any) -> str:
        """Return the text of ``o``."""
        return self.iterencode(o)
