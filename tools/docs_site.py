"""MkDocs' hooks for the documentation site: a page of every option, and links out of docs/."""

from __future__ import annotations

import argparse
import importlib
import re
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_scalebio.cli import COMMANDS
from megatron_scalebio.config import SECTIONS, Config
from megatron_scalebio.config_loader import add_arguments

OPTIONS = "options.md"
_INTRODUCTION = """\
# Every option

First those of a run, which `reweight`, `train`, `evaluate` and `plan` take: in a YAML file under
their section, or as flags. Then what each command takes besides. Brackets: the default, where it
depends on other options.
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
    """Every option: of a run, as the configuration's classes have it; of commands, as they do."""
    parts = [_INTRODUCTION]
    for name, section in SECTIONS.items():
        cls = typing.get_type_hints(Config)[section.name]
        rows = [f"## {name}", "", "| in the file | flag | default | |", "|---|---|---|---|"]
        for spec in fields(cls):
            flag = "" if spec.name == "rope_scaling" else f"`--{spec.name.replace('_', '-')}`"
            text = spec.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
            rows.append(f"| `{spec.name}` | {flag} | {_default(spec.default)} | {text} |")
        parts.append("\n".join(rows) + "\n")
    of_a_run = argparse.ArgumentParser()
    add_arguments(of_a_run)
    for name, (module, _) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        parts += _of_a_command(name, parser, _flags(of_a_run))
    return "\n".join(parts)


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def _of_a_command(name: str, parser: argparse.ArgumentParser, of_a_run: set[str]) -> Iterator[str]:
    """Its options but those of a run, if it takes them; of a command with others in it, theirs."""
    told_already = of_a_run if of_a_run <= _flags(parser) else {"--help"}
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, each in action.choices.items():
                yield from _of_a_command(f"{name} {word}", each, of_a_run)
        elif not told_already & {*action.option_strings}:
            words = action.option_strings or [str(action.metavar or action.dest)]
            told = (action.help or "").replace("|", "\\|").replace("<", "&lt;")
            rows.append(f"| {', '.join(f'`{word}`' for word in words)} | {told} |")
    if rows:
        yield "\n".join([f"## {name}", "", "| | |", "|---|---|", *rows]) + "\n"


def _default(value: Any) -> str:
    if value is None or value is MISSING or value == "":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
