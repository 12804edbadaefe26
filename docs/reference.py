# SPDX-License-Identifier: Apache-2.0
"""Pages of reference, made from the code: configuration keys from their fields, variables from their table.

mkdocs calls `on_files`; `python docs/reference.py FOLDER` writes the pages there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel


def configuration() -> str:
    """The page of training configuration."""
    from deepspeed.runtime.config import describe
    from deepspeed.runtime.config_unbuilt import UNBUILT

    lines = [
        "# Configuration",
        "",
        "Every key that a configuration may have. This page is made from the fields that parse it.",
        "",
        'A key that is not set has the default. In most sections `"auto"` means the default too.',
        "Unknown keys at the top are ignored. Unknown keys in a section are an error in most sections.",
        "",
        "## What is refused",
        "",
        "These keys are understood, and training with them is refused: what they ask for is not built yet.",
        "",
        "| key | what it asks for | do this |",
        "| --- | --- | --- |",
        *(f"| `{row.key}` | {row.feature} | {row.instead} |" for row in UNBUILT),
        "",
        *_keys(describe()),
    ]
    return "\n".join(lines) + "\n"


def inference_configuration() -> str:
    """The page of `init_inference`'s configuration."""
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.runtime.config import describe

    lines = [
        "# Inference configuration",
        "",
        "What `deepspeed.init_inference` takes, as words or in `config`. Made from the fields that parse it.",
        "",
        "Section `zero` has the keys of [`zero_optimization`](configuration.md#zero_optimization).",
        "",
        *_keys(
            info for info in describe(DeepSpeedInferenceConfig) if not info.path.startswith("zero.")
        ),
    ]
    return "\n".join(lines) + "\n"


def environment() -> str:
    """The page of environment variables."""
    from deepspeed.utils import env

    lines = [
        "# Environment variables",
        "",
        "Every variable that the package reads.",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, variable in env.declared().items():
        lines.append(f"| `{name}` | {_value(variable.default)} | {_cell(variable.doc)} |")
    return "\n".join(lines) + "\n"


PAGES = {
    "configuration.md": configuration,
    "inference_configuration.md": inference_configuration,
    "environment.md": environment,
}


def _keys(described: Any) -> Iterator[str]:
    """One table for the keys at the top, and one with a heading for each section."""
    tables: dict[str, list[Any]] = {"": []}
    words: dict[str, str] = {}
    for info in described:
        above, _, name = info.path.rpartition(".")
        if info.type == "section" or any(path == info.path for path in tables):
            words[info.path] = info.description
            tables.setdefault(info.path, [])
        tables.setdefault(above, []).append((name, info))
    for section, rows in tables.items():
        if not rows:
            continue
        yield f"## {section or 'Top level'}"
        yield ""
        if section in words:
            yield words[section]
            yield ""
        yield "| key | type | default | meaning |"
        yield "| --- | --- | --- | --- |"
        for name, info in rows:
            also = f" Also spelled `{info.alias}`." if info.alias else ""
            retired = " **Deprecated.**" if info.deprecated else ""
            default = "" if info.type == "section" else _value(info.default)
            meaning = f"{_cell(info.description)}{also}{retired}"
            yield f"| `{name}` | {_cell(info.type)} | {default} | {meaning} |"
        yield ""


def _cell(text: str) -> str:
    return text.replace("|", "or").replace("\n", " ").replace("<", "&lt;")


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "section"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    text = str(getattr(value, "value", value))
    return f"`{text}`".replace("|", "\\|")


def on_files(files: Any, config: Any) -> Any:
    """Give mkdocs the pages that are made here."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/reference")
    folder.mkdir(parents=True, exist_ok=True)
    for page, make_page in PAGES.items():
        (folder / page).write_text(make_page(), encoding="utf-8")
        print(folder / page)
