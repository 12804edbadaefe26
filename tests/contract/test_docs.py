# SPDX-License-Identifier: Apache-2.0
"""The documentation: its samples run, its configurations parse, its messages exist, and the site builds."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_unbuilt import UNBUILT, find_unbuilt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page):
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page, language):
    return [code for found, code in FENCE.findall(text(page)) if found == language]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_samples_run_from_the_top_of_a_page_to_its_end(page, tmp_path, monkeypatch):
    for package in re.findall(r"^needs: (\w+)$", text(page), re.MULTILINE):
        module = {"transformers": "transformers.modeling_utils"}.get(package, package)
        pytest.importorskip(module, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page}, sample {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")])
def test_configurations_have_known_keys_and_nothing_that_is_refused(page):
    known = {info.split(".")[0] for info in all_keys()}
    for code in blocks(page, "json"):
        config = json.loads(code)
        assert set(config) <= known
        assert find_unbuilt(DeepSpeedConfig(config)) == []


def all_keys():
    from deepspeed.runtime.config import describe

    return [info.path for info in describe()]


def test_messages_are_those_that_the_package_has():
    spoken = {
        node.value
        for path in (ROOT / "deepspeed").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quoted = re.findall(r"^\*\*`(.+?)`\*\*", text("troubleshooting.md"), re.MULTILINE)
    assert len(quoted) > 20
    assert [message for message in quoted if not any(message in said for said in spoken)] == []


def reference():
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_key_once_and_says_what_is_refused():
    page = reference().configuration()
    for path in all_keys():
        section, _, name = path.rpartition(".")
        assert f"\n| `{name}` |" in page
        assert not section or f"\n## {section}\n" in page
    for row in UNBUILT:
        assert f"| `{row.key}` | {row.feature} |" in page
    assert "| `stage3_prefetch_bucket_size`" not in page  # an alias is no key of its own
    assert "Also spelled `stage3_prefetch_bucket_size`." in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in rows} <= {2, 3}


def test_the_reference_has_the_fields_of_inference_and_the_variables():
    made = reference()
    assert "| `replace_with_kernel_inject` | bool | `false` |" in made.inference_configuration()
    assert "| `max_out_tokens` | int | `1024` |" in made.inference_configuration()
    assert "| `DS_ACCELERATOR` |" in made.environment()


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "s")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name for path in (tmp_path / "s").glob("*.html")}
    assert {"index.html", "troubleshooting.html", "configuration.html", "environment.html"} <= pages
    assert not (tmp_path / "s" / "reference.py").exists()


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    made = set(reference().PAGES)
    assert [page for page in {*PAGES, *made} if f": {page}\n" not in menu] == []


def test_readmes_table_of_libraries_is_the_one_that_tests_gave():
    spec = importlib.util.spec_from_file_location("docs_works", DOCS / "works.py")
    works = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(works)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{works.MARKS[0]}\n{works.table()}\n{works.MARKS[1]}" in readme
    results = json.loads(works.KEPT.read_text(encoding="utf-8"))
    assert all(one["passed"] == one["of"] for found in results.values() for one in found.values())
