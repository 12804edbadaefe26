# SPDX-License-Identifier: Apache-2.0
"""The ground layer: environment variables, error messages, the logger, lazy packages."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch

from deepspeed.utils import env
from deepspeed.utils import logging as ds_logging
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, explain
from deepspeed.utils.lazy import lazy_exports
from deepspeed.utils.logging import log_dist, logger


# ------------------------------------------------------------------ environment
def test_variables_have_type_default_and_meaning(monkeypatch):
    for name, variable in env.declared().items():
        assert variable.name == name
        assert variable.doc.endswith(".")
        monkeypatch.delenv(name, raising=False)
        assert variable.get() == variable.default
        assert not variable.is_set()


def test_a_variable_is_parsed_set_and_removed(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert env.RANK.get() == 3
    env.RANK.set(4)
    assert env.RANK.raw() == "4"
    env.RANK.unset()
    env.RANK.unset()
    assert env.RANK.get() is None


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("", False)]
)
def test_switches_read_the_usual_words(monkeypatch, text, value):
    monkeypatch.setenv("DS_KERNEL_SOURCE", text)
    assert env.DS_KERNEL_SOURCE.get() is value


@pytest.mark.parametrize(("name", "text"), [("RANK", "one"), ("DS_KERNEL_SOURCE", "perhaps")])
def test_a_wrong_value_names_the_variable(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name} cannot be read: got '{text}'"):
        env.declared()[name].get()


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "it broke."),
        ({"got": 3}, "it broke: got 3."),
        ({"got": "three"}, "it broke: got three."),
        ({"expected": [1]}, "it broke: expected [1]."),
        (
            {"got": 3, "expected": "4", "fix": "Add 1."},
            "it broke: got 3, expected 4. Add 1.",
        ),
        ({"fix": "Mend it."}, "it broke. Mend it."),
    ],
)
def test_messages_have_one_form(parts, text):
    assert explain("it broke.", **parts) == text
    assert explain("it broke", **parts) == text


def test_configuration_errors_are_ours():
    assert issubclass(DeepSpeedConfigError, DeepSpeedError)


# ------------------------------------------------------------------ logger
@pytest.fixture
def talkative():
    before = logger.level
    logger.setLevel(logging.INFO)
    ds_logging._said.clear()
    yield
    logger.setLevel(before)


def as_rank(monkeypatch, rank):
    monkeypatch.setattr(ds_logging, "_rank", lambda: rank)


def test_the_logger_is_as_promised(capsys):
    assert (logger.name, logger.propagate, logger.level) == ("DeepSpeed", False, logging.WARNING)
    logger.warning("hello")
    logger.info("unheard")
    out = capsys.readouterr()
    assert out.err == ""
    assert out.out.count("\n") == 1
    stamp, level, place, text = out.out.split("] ", 3)
    assert level == "[WARNING"
    assert place.startswith("[test_ground.py:")
    assert place.endswith(":test_the_logger_is_as_promised")
    assert text == "hello\n"
    assert len(stamp) == len("[2026-11-22 15:55:24,027")


@pytest.mark.parametrize(
    ("rank", "ranks", "speaks"),
    [
        (-1, None, True),
        (-1, [3], True),
        (0, None, False),
        (0, [], False),
        (0, [0], True),
        (1, [0], False),
        (1, [-1], True),
        (1, [0, 1], True),
    ],
)
def test_ranks_decide_who_speaks(monkeypatch, capsys, talkative, rank, ranks, speaks):
    as_rank(monkeypatch, rank)
    log_dist("word", ranks=ranks)
    ds_logging.print_dist("word", ranks=ranks)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * speaks
    assert all(line.endswith(f"[Rank {rank}] word") for line in lines)
    if speaks:
        assert "test_ground.py" in lines[0]  # the caller, not the logger's own file


def test_messages_below_the_level_are_not_logged(capsys):
    log_dist("quiet", ranks=[-1])
    assert capsys.readouterr().out == ""


def test_once_is_once(monkeypatch, capsys, talkative):
    as_rank(monkeypatch, 0)
    for _ in range(3):
        ds_logging.log_dist_once("a", ranks=[0])
        ds_logging.warning_once("b")
    ds_logging.log_dist_once("c", ranks=[0])
    assert [line[-1] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "c"]


def test_levels_have_names():
    before = logger.level
    ds_logging.set_log_level_from_string("DEBUG")
    assert ds_logging.get_current_level() == logging.DEBUG
    assert ds_logging.should_log_le("info")
    other = logging.getLogger("other")
    ds_logging.set_log_level_from_string("error", other)
    assert other.level == logging.ERROR
    logger.setLevel(before)
    assert not ds_logging.should_log_le("info")
    with pytest.raises(ValueError, match="unknown log level"):
        ds_logging.set_log_level_from_string("loud")


def test_json_lines_carry_the_rank(monkeypatch, tmp_path):
    as_rank(monkeypatch, 1)
    ds_logging.print_json_dist({"loss": 2.0}, ranks=[1], path=str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written == {"loss": 2.0, "rank": 1}


# ------------------------------------------------------------------ lazy packages
def test_a_lazy_table_finds_keeps_and_refuses(monkeypatch):
    package = type(sys)("lazy_package")
    monkeypatch.setitem(sys.modules, "lazy_package", package)
    find, listing, names = lazy_exports("lazy_package", {"json": ["loads", "*"]})
    assert names == ["json", "loads"]
    assert find("loads") is json.loads
    assert package.loads is json.loads
    assert find("json") is json
    assert "loads" in listing()
    with pytest.raises(AttributeError, match="no attribute 'dumps'"):
        find("dumps")


@pytest.mark.parametrize(
    "name",
    [
        "logger",
        "log_dist",
        "log_dist_once",
        "set_log_level_from_string",
        "get_caller_func",
        "OnDevice",
        "groups",
        "instrument_w_nvtx",
        "RepeatingLoader",
        "get_numactl_cmd",
        "is_initialized",
        "safe_get_full_grad",
        "safe_get_full_fp32_param",
        "safe_set_full_optimizer_state",
    ],
)
def test_flat_exports_are_there(name):
    import deepspeed.utils

    assert getattr(deepspeed.utils, name) is not None
    assert name in dir(deepspeed.utils)


def test_leaves_do_not_import_their_siblings():
    script = (
        "import sys, deepspeed.utils.logging, deepspeed.accelerator, deepspeed.comm\n"
        "loaded = [m for m in sys.modules if m.startswith('deepspeed.') and m.count('.') == 2]\n"
        "assert 'torch' not in sys.modules\n"
        "print(sorted(loaded))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True
    )
    allowed = {"env", "errors", "lazy", "logging", "z3_leaf_module"}
    assert {
        name.rpartition(".")[2] for name in json.loads(done.stdout.replace("'", '"'))
    } <= allowed


def test_torch_versions_compare_by_number(monkeypatch):
    from deepspeed.utils.torch import required_torch_version

    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    assert required_torch_version(min_version="2.3")
    assert required_torch_version(min_version=2.9)  # 2.13 is newer than 2.9
    assert required_torch_version(min_version=2.3, max_version="2.13")
    assert not required_torch_version(max_version=2.9)
    with pytest.raises(AssertionError):
        required_torch_version()


def test_modules_of_a_package_are_its_attributes(monkeypatch):
    import deepspeed.elasticity as package

    monkeypatch.delitem(sys.modules, "deepspeed.elasticity.config", raising=False)
    monkeypatch.delattr(package, "config", raising=False)
    assert package.config.__name__ == "deepspeed.elasticity.config"
    with pytest.raises(AttributeError, match="no attribute 'settings'"):
        _ = package.settings
