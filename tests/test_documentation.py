"""The documentation: its site builds without a broken link, and what pages name is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest

from megatron_scalebio.config import SECTIONS, Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (make docs brings it)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    written = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in ROOT.glob("docs/*.md")} | {"options"} <= written
    for page in site.glob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, (page, loaded)


def test_the_site_lists_every_option(site: Path) -> None:
    page = (site / "options.html").read_text()
    assert "<code>data_<wbr>args_<wbr>path</code>" in page
    page = page.replace("<wbr>", "")
    for name, section in SECTIONS.items():
        for spec in fields(get_type_hints(Config)[section.name]):
            assert f"<code>{spec.name}</code>" in page, f"{name}.{spec.name}"
    assert "<code>--lr</code>" in page and "peak learning rate of the model (w)" in page
    for flag in ("--train-sentencepiece", "--max-epochs", "--mt-bench", "--dry-run", "--rows"):
        assert f"<code>{flag}</code>" in page, flag
    assert page.count("<code>--lr</code>") == 1 and "convert import" in page
    assert page.count("<code>--seq-length</code>") == 3, "of a run, prepare and sample"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """The site's own check does not see the README, nor what lies outside docs/."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if linked.name == "options.md":
            continue  # the site's own
        assert linked.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {slug(head) for head in heads}, target


def slug(head: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip())


def test_the_readme_is_about_a_page_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
