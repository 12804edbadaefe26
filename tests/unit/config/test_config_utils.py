# SPDX-License-Identifier: Apache-2.0
"""The base model and the tools of runtime/config_utils.py."""

from __future__ import annotations

import json

import pytest
from pydantic import Field, ValidationError

from deepspeed.runtime.config_utils import (
    DeepSpeedConfigModel,
    ScientificNotationEncoder,
    deprecated,
    get_config_default,
    get_dict_param,
    get_list_param,
    get_scalar_param,
    nearest,
    pp_int,
    section_of,
)


class Inner(DeepSpeedConfigModel):
    size: int = 1


class Sample(DeepSpeedConfigModel):
    width: int = Field(default=3, alias="w")
    word: str = "one"
    inner: Inner = Field(default_factory=Inner)
    moved: int | None = Field(default=None, json_schema_extra=deprecated("width"))
    deep: int | None = Field(
        default=None, json_schema_extra=deprecated("inner.size", convert=lambda value: 2 * value)
    )
    hint: int | None = Field(
        default=None, json_schema_extra=deprecated("width or word", set_new=False)
    )
    gone: int | None = Field(default=None, json_schema_extra=deprecated(message="and does nothing"))
    replace_method: str = "first"


@pytest.mark.parametrize("key", ["width", "w"])
def test_field_name_and_alias_are_both_taken(key):
    assert Sample(**{key: 5}).width == 5


def test_auto_is_dropped_unless_strict_or_exempt():
    assert Sample(word="auto").word == "one"
    assert Sample(strict=True, word="auto").word == "auto"
    assert Sample(replace_method="auto").replace_method == "auto"
    assert Sample(inner={"size": "auto"}).inner.size == 1


def test_values_are_validated_at_assignment():
    sample = Sample()
    sample.width = "7"
    assert sample.width == 7
    with pytest.raises(ValidationError):
        sample.width = "wide"


@pytest.mark.parametrize(
    ("keys", "check"),
    [
        ({"moved": 8}, lambda s: s.width == 8),
        ({"deep": 8}, lambda s: s.inner.size == 16),
        ({"hint": 8}, lambda s: s.width == 3 and s.word == "one"),
        ({"gone": 8}, lambda s: s.model_fields_set == set()),
    ],
)
def test_deprecated_fields_move_to_their_successor(logged, keys, check):
    name = next(iter(keys))
    sample = Sample(**keys)
    assert check(sample)
    assert not hasattr(sample, name) and name not in sample.model_fields_set
    assert len(logged) == 1 and f"Config parameter {name} is deprecated" in logged[0]
    assert name not in sample.model_dump()


@pytest.mark.parametrize("keys", [{"moved": 1, "width": 2}, {"deep": 1, "inner": {"size": 2}}])
def test_deprecated_field_beside_its_successor_is_refused(keys):
    with pytest.raises(AssertionError, match="Cannot provide deprecated parameter.*together"):
        Sample(**keys)


def test_deprecated_default_says_nothing(logged):
    Sample()
    assert logged == []


def test_unknown_key_in_a_model_named_by_a_user():
    with pytest.raises(ValidationError, match="unknown key 'widht', did you mean 'width'"):
        Sample(widht=1)


def test_nearest_word():
    assert nearest("stagee", ["stage", "device"]) == "stage"
    assert nearest("xyzzy", ["stage", "device"]) is None


def test_param_getters_give_the_value_or_the_default():
    for getter in (get_scalar_param, get_list_param, get_dict_param):
        assert getter({"a": 0}, "a", 5) == 0
        assert getter({}, "a", 5) == 5


def test_default_of_a_field():
    assert get_config_default(Sample, "width") == 3
    assert get_config_default(Sample, "inner") == Inner()
    with pytest.raises(ValueError, match="height"):
        get_config_default(Sample, "height")


def test_section_of_gives_a_copy():
    whole = {"a": {"b": 1}, "n": None}
    section_of(whole, "a")["b"] = 2
    assert whole["a"]["b"] == 1 and section_of(whole, "n") == {} == section_of(whole, "m")
    with pytest.raises(TypeError, match="'a'"):
        section_of({"a": 3}, "a")


def test_pp_int_prints_with_separators():
    number = pp_int(5e8)
    assert number == 500_000_000 and isinstance(number, int)
    assert repr(number) == "500,000,000"
    assert repr(pp_int(7, "seven")) == "seven"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (1000, "1000"),
        (1001, "1.001000e+03"),
        (5e8, "5.000000e+08"),
        (True, "true"),
        (None, "null"),
        (0.5, "0.5"),
        ("x", '"x"'),
        ([1, 2e9], "[1, 2.000000e+09]"),
        ({}, "{}"),
        ({"a": {"b": 2000}}, '{\n    "a": {\n        "b": 2.000000e+03\n    }\n}'),
    ],
)
def test_large_numbers_in_scientific_notation(value, text):
    assert json.dumps(value, cls=ScientificNotationEncoder) == text
    assert json.loads(text) == value
