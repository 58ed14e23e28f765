"""MkDocs' hooks for the documentation site: a page of every option, and links out of docs/."""

from __future__ import annotations

import re
import typing
from dataclasses import MISSING, fields
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_scalebio.config import SECTIONS, Config

OPTIONS = "options.md"
_INTRODUCTION = """\
# Every option

These are the options of `reweight`, `train`, `evaluate` and `plan`: in a YAML file under their
section, or as flags. (For those of `prepare`, `sample`, `convert`, `show` and `compare`, see their
`--help` or `--help-all`.) Brackets: the default, where it depends on other options.
"""
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    files.append(File.generated(config, OPTIONS, content=options_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The site has the folder docs/ alone: what lies beside it is named by its path."""

    def named(link: re.Match[str]) -> str:
        path = link[2].removeprefix("../").partition("#")[0]
        return link[1] if PurePosixPath(path).name in link[1] else f"{link[1]} (`{path}`)"

    return _OUTSIDE.sub(named, markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Lets a browser break the options' names where a reader would, too."""
    if page.file.src_uri != OPTIONS:
        return html
    return re.sub(r"<code>\w+</code>", lambda name: name[0].replace("_", "_<wbr>"), html)


def options_page() -> str:
    """Every option of a run, as the configuration's own classes have it."""
    parts = [_INTRODUCTION]
    for name, section in SECTIONS.items():
        cls = typing.get_type_hints(Config)[section.name]
        rows = [f"## {name}", "", "| in the file | flag | default | |", "|---|---|---|---|"]
        for spec in fields(cls):
            flag = "" if spec.name == "rope_scaling" else f"`--{spec.name.replace('_', '-')}`"
            text = spec.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
            rows.append(f"| `{spec.name}` | {flag} | {_default(spec.default)} | {text} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _default(value: Any) -> str:
    if value is None or value is MISSING or value == "":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
