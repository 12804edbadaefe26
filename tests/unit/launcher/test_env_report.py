# SPDX-License-Identifier: Apache-2.0
"""ds_report: what people grep for, what programs read, and that a broken part does not break the report."""

from __future__ import annotations

import json

import pytest

from deepspeed import env_report, git_version_info


@pytest.fixture
def _no_programs(monkeypatch):
    monkeypatch.setattr(env_report, "_first_line", lambda *command: None)


pytestmark = pytest.mark.usefixtures("_no_programs")

ROWS = (
    "torch install path ............... ",
    "torch version .................... ",
    "deepspeed install path ........... ",
    "deepspeed info ................... ",
    "deepspeed wheel compiled w. ...... ",
    "shared memory (/dev/shm) size .... ",
    "accelerator ...................... ",
    "native library ................... ",
    "cpu features in use .............. ",
    "compilers ........................ ",
    "distributed backends ............. ",
)


def test_text_has_the_lines_that_people_look_for(capsys):
    env_report.cli_main([])
    out = capsys.readouterr().out
    order = [
        "DeepSpeed C++/CUDA extension op report",
        "JIT compiled ops requires ninja",
        "ninja .................. [",
        "op name ................ installed .. compatible",
        "cpu_adam ............... [",
        "DeepSpeed general environment info:",
        *ROWS,
    ]
    places = [out.index(line) for line in order]
    assert places == sorted(places)
    assert f"deepspeed info ................... {git_version_info.version}, " in out
    assert "\033" not in out


def test_ops_can_be_hidden(capsys):
    env_report.cli_main(["--hide_operator_status", "--hide_errors_and_warnings"])
    out = capsys.readouterr().out
    assert "op name" not in out
    assert "DeepSpeed general environment info:" in out


def test_json_holds_the_same_facts(capsys):
    env_report.cli_main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert not [name for name, value in facts.items() if "error" in value]
    assert facts["deepspeed"]["version"] == git_version_info.version
    assert facts["native"]["route"] in ("native", "reference")
    assert {op["route"] for op in facts["ops"]} == {facts["native"]["route"]}
    assert "adam_step" in [op["name"] for op in facts["ops"]]
    by_name = {op["name"]: op for op in facts["builders"]}
    assert by_name["cpu_adam"]["compatible"]
    assert by_name["cpu_adam"]["installed"] == (facts["native"]["route"] == "native")


def test_each_op_has_a_route_and_a_reason(capsys):
    env_report.cli_main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    rows = {op["name"]: op for op in facts["builders"]}
    words = ("prebuilt", "source", "reference", "none")
    assert all(row["route"] in words and row["reason"] for row in rows.values())
    assert rows["gds"]["route"] == "none" and "GPUDirect" in rows["gds"]["reason"]
    if facts["accelerator"]["name"] == "cpu":
        assert rows["spatial_inference"]["route"] == "reference"
        assert rows["spatial_inference"]["compatible"]
    if facts["native"]["route"] == "native":
        assert rows["async_io"]["reason"].split()[0] in ("io_uring", "iocp", "threads")
        assert rows["cpu_adam"]["route"] == "prebuilt"


def test_the_report_survives_a_broken_library(capsys, monkeypatch, tmp_path):
    from deepspeed.ops import native

    library = tmp_path / "broken.so"
    library.write_bytes(b"no library")
    monkeypatch.setenv("DS_NATIVE_LIBRARY", str(library))
    monkeypatch.setattr(native, "_cached", None)
    env_report.cli_main([])
    out = capsys.readouterr().out
    assert "native library ................... broken: " in out
    assert "cpu_adam ............... [NO] ....... [NO] broken" in out


@pytest.mark.parametrize(
    "section",
    [
        "_torch",
        "_accelerator",
        "_machine",
        "_native",
        "_builders",
        "_ops",
        "_distributed",
        "_compilers",
        "_packages",
        "_environment",
    ],
)
def test_the_report_survives_a_section_that_fails(section, capsys, monkeypatch):
    def fails():
        raise OSError("a DLL is missing")

    monkeypatch.setattr(env_report, section, fails)
    env_report.cli_main([])
    out = capsys.readouterr().out
    assert "DeepSpeed general environment info:" in out
    if section not in ("_packages", "_environment"):
        assert "OSError: a DLL is missing" in out


def test_what_libraries_print_stays_out_of_json(capsys, monkeypatch):
    monkeypatch.setattr(env_report, "_machine", lambda: print("chatter") or {})
    env_report.cli_main(["--json", "--hide_operator_status"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["machine"] == {}
    assert "chatter" in captured.err


def test_small_shared_memory_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(env_report, "SHM", tmp_path)
    monkeypatch.setattr(
        env_report.shutil,
        "disk_usage",
        lambda _: env_report.shutil._ntuple_diskusage(64 << 20, 0, 0),
    )
    size, warning = env_report.get_shm_size()
    assert size == "64.00 MB"
    assert "--shm-size" in warning
    monkeypatch.setattr(env_report, "SHM", tmp_path / "none")
    assert env_report.get_shm_size() == ("UNKNOWN", None)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.00 B"),
        (1023, "1023.00 B"),
        (1536, "1.50 KB"),
        (5 << 30, "5.00 GB"),
        (3 << 40, "3.00 TB"),
    ],
)
def test_sizes_are_readable(size, text):
    assert env_report.human_readable_size(size) == text
