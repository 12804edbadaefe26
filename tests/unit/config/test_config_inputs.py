# SPDX-License-Identifier: Apache-2.0
"""The forms in which a configuration is accepted, and what is said when it is none of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

GIVEN = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}


def in_base64(text):
    return base64.urlsafe_b64encode(text.encode()).decode()


def check(config):
    assert config.train_batch_size == 8
    assert config.train_micro_batch_size_per_gpu == 4
    assert config.zero_config.stage == 2


def test_dictionary_is_kept_as_it_is():
    config = DeepSpeedConfig(GIVEN)
    check(config)
    assert config._param_dict is GIVEN
    assert GIVEN == {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
    }


@pytest.mark.parametrize("as_type", [str, Path])
def test_path_of_a_json_file(tmp_path, as_type):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(GIVEN), encoding="utf-8")
    check(DeepSpeedConfig(as_type(path)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_hjson_file_with_comments_trailing_commas_and_bare_keys(tmp_path, encoding):
    path = tmp_path / "größe.hjson"
    path.write_text(
        "{\n  # eight in all: 8 · 1\n  train_batch_size: 8,\n  // half\n"
        '  "gradient_accumulation_steps": 2,\n  zero_optimization: {stage: 2,},\n}\n',
        encoding=encoding,
    )
    check(DeepSpeedConfig(str(path)))


def test_url_safe_base64_of_json():
    text = json.dumps({**GIVEN, "note": "???>>>~~~"})  # whose base64 uses - and _
    code = in_base64(text)
    assert "-" in code or "_" in code
    check(DeepSpeedConfig(code))


def test_base64_longer_than_any_file_name():
    check(DeepSpeedConfig(in_base64(json.dumps({**GIVEN, "padding": "x" * 10_000}))))


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('{"train_batch_size": 1, "train_batch_size": 2}', ["train_batch_size"]),
        ('{"train_batch_size": 1, "fp16": {"enabled": true, "enabled": true}}', ["enabled"]),
    ],
)
@pytest.mark.parametrize("form", ["file", "base64"])
def test_duplicate_keys_at_any_level_are_refused(tmp_path, text, keys, form):
    source = in_base64(text)
    if form == "file":
        source = tmp_path / "twice.json"
        source.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="Duplicate keys in DeepSpeed config") as caught:
        DeepSpeedConfig(source)
    assert str(keys) in str(caught.value)
    assert isinstance(caught.value, DeepSpeedConfigError)


@pytest.mark.parametrize("source", ["no_such_file.json", "/no/such/folder/ds.json", "", "{}", "ä"])
def test_text_that_is_neither_file_nor_base64_is_a_value_error(source):
    with pytest.raises(ValueError) as caught:
        DeepSpeedConfig(source)
    for word in ("path", "dict", "base64"):
        assert word in str(caught.value)


def test_base64_of_something_else_is_a_value_error():
    with pytest.raises(ValueError, match="base64"):
        DeepSpeedConfig(base64.urlsafe_b64encode(b"\xff\xfe\x00").decode())


@pytest.mark.parametrize("text", ['{"train_batch_size": 1, ', '{"a": }', "[1, 2]", '"text"'])
def test_file_that_holds_no_json_object_is_a_value_error_that_names_it(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json"):
        DeepSpeedConfig(path)


def test_file_in_another_encoding_is_a_value_error_that_says_so(tmp_path):
    path = tmp_path / "utf16.json"
    path.write_text(json.dumps(GIVEN), encoding="utf-16")
    with pytest.raises(ValueError, match=r"utf16\.json is not UTF-8"):
        DeepSpeedConfig(path)


@pytest.mark.parametrize("source", [None, 5, [1], 1.5, b"{}"])
def test_other_types_are_a_type_error(source):
    with pytest.raises(TypeError, match="dictionary"):
        DeepSpeedConfig(source)


def test_folder_is_not_a_config(tmp_path):
    with pytest.raises(ValueError, match="existing JSON file"):
        DeepSpeedConfig(tmp_path)


def test_hook_builds_a_dictionary_when_no_key_repeats():
    assert dict_raise_error_on_duplicate_keys([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "key", ["zero_optimization.reduce_bucket_size", "my_own_key", "hf_deepspeed", "stage"]
)
def test_unknown_and_dotted_top_level_keys_are_ignored_in_silence(logged, key):
    config = DeepSpeedConfig({"train_batch_size": 1, key: 5})
    assert config.zero_config.reduce_bucket_size == 5e8
    assert logged == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("zero_optimisation", "zero_optimization"),
        ("gradient_cliping", "gradient_clipping"),
        ("train_micro_batch_size_per_gpus", "train_micro_batch_size_per_gpu"),
    ],
)
def test_slip_of_the_pen_at_the_top_level_is_ignored_with_a_warning(logged, wrong, right):
    config = DeepSpeedConfig({"train_batch_size": 4, wrong: 2})
    assert config.gradient_accumulation_steps == 1
    assert [text for text in logged if wrong in text and right in text]


def test_slip_inside_a_section_that_ignores_unknown_keys_is_warned_of(logged):
    DeepSpeedConfig({"train_batch_size": 1, "flops_profiler": {"enable": True, "custom": 1}})
    assert len(logged) == 1
    assert "'enable'" in logged[0] and "'enabled'" in logged[0] and "flops_profiler" in logged[0]


@pytest.mark.parametrize(
    "name",
    ["zero_optimization", "fp16", "optimizer", "scheduler", "aio", "checkpoint", "elasticity"],
)
@pytest.mark.parametrize("value", ["text", 3, [1]])
def test_section_of_the_wrong_type_is_a_type_error_that_names_it(name, value):
    with pytest.raises(TypeError, match=name) as caught:
        DeepSpeedConfig({"train_batch_size": 1, name: value})
    assert isinstance(caught.value, DeepSpeedConfigError)


@pytest.mark.parametrize("name", ["zero_optimization", "fp16", "optimizer", "amp", "elasticity"])
def test_null_section_counts_as_absent(name):
    absent = vars(DeepSpeedConfig({"train_batch_size": 1}))
    null = vars(DeepSpeedConfig({"train_batch_size": 1, name: None}))
    for key in ("zero_config", "float16_config", "optimizer_name", "amp_params"):
        assert null[key] == absent[key]
