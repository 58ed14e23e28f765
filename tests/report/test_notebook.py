"""examples/weights.ipynb runs on a run's folder, shows what is in it, and prints what runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_scalebio.cli import main
from megatron_scalebio.logs.interactions import Interaction
from megatron_scalebio.logs.source_table import LISTED_SOURCES, TABLE_FILE, SourceTable
from tests.commands import ROOT

NOTEBOOK = ROOT / "examples" / "weights.ipynb"
TOKENIZER = ROOT / "tokenizers" / "english-code-1k.model"
ABSENT = [name for name in ("nbclient", "ipykernel") if find_spec(name) is None]


def said(notebook: Any) -> str:
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def use_table(run: Path, sources: int) -> None:
    """What a run of many sources leaves: few steps, in a file of their own."""
    table, metrics = SourceTable(run / TABLE_FILE, sources), run / "metrics.jsonl"
    table.interval = 7
    lines = [json.dumps(table.take(json.loads(line))) for line in metrics.open()]
    table.close()
    metrics.write_text("\n".join(lines) + "\n")


def executed(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """What the notebook says of a run, and how many pictures it shows."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", [])
                if "image/png" in out.get("data", {})]  # fmt: skip
    return said(notebook), len(pictures)


def prepare_data(run: Path, names: list[str]) -> None:
    """The sources of a synthetic run, beside it, and a validation set with a row of the first."""
    raw, words = run.parent / "raw", ["--tokenizer", f"{TOKENIZER}", "--workers", "1"]
    raw.mkdir()
    for i in [*range(len(names)), "goal"]:
        rows = [{"text": f"row {n} of {0 if i == 'goal' else i}"} for n in range(3)]
        text = "\n".join(map(json.dumps, rows[:1] if i == "goal" else rows))
        (raw / f"{i}.jsonl").write_text(text)
        words += ["--input", f"{i}={raw}/{i}.jsonl"]
    assert main(["prepare", "--out", str(run.parent / "prepared"), *words]) == 0


def with_goal(run: Path) -> Path:
    """The run's configuration names its validation set."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["validation"] = [{"name": "goal", "path": "prepared/goal"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
@pytest.mark.parametrize("grouped", [None, [f"web/{i}" for i in range(LISTED_SOURCES + 50)]])
def test_the_notebook_runs_from_top_to_bottom(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, grouped: list[str] | None
) -> None:
    run = with_goal(make_run(grouped, steps=60))
    if grouped:
        use_table(run, len(grouped))
    path = run / "weights.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["sources"]]
    path.write_text(json.dumps(content | {"indistinguishable": [names[:2]]}))
    text, pictures = executed(run, monkeypatch)
    assert "The mixture has settled" in text and "- Use the weights." in text
    assert f"only their sum is known: {names[0]}, {names[1]}" in text
    assert not grouped or f"web  ({len(names)} sources)" in text
    assert pictures == 3 and "bilevel: {interactions: true}" in text
    command = shlex.split(text.splitlines()[-1])
    heaviest = max(content["sources"], key=lambda entry: entry["weight"])["name"]
    assert command[command.index("--weights") + 1].startswith(f"{heaviest}=")
    given = {"--input": [f"{name}=prepared/{i}" for i, name in enumerate(names)],
             "--exclude": ["goal=prepared/goal"]}  # fmt: skip
    for option, values in given.items():
        pairs = pairwise(command)
        assert [value for flag, value in pairs if flag == option] == values
    if grouped:
        return
    prepare_data(run, names)
    monkeypatch.chdir(run.parent)
    assert command[0] == "megatron-scalebio" and main(command[1:]) == 0
    drawn = json.loads(Path("data/mixed/manifest.json").read_text())["sources"]
    assert {entry["name"] for entry in drawn} == set(names)
    left_out = {entry["name"]: entry["contaminated"]["exact"] for entry in drawn}
    assert left_out == dict.fromkeys(names, 0) | {names[0]: 1}, "the validation set's row"


@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
def test_the_notebook_has_the_runs_own_groups_and_what_serves_which_set(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_goal(make_run(["web/a", "web/b", "code/c"], steps=60))
    content = json.loads((run / "weights.json").read_text())
    content["groups"] = [
        {"level": 1, "name": "code", "weight": 0.27, "ci_low": 0.21, "ci_high": 0.34},
        {"level": 1, "name": "web", "weight": 0.73, "ci_low": None, "ci_high": None},
    ]
    (run / "weights.json").write_text(json.dumps(content))
    serves = np.array([[0.5, -0.25], [0.125, 0.0], [-0.5, 0.25]])
    half = np.array([[0.1, 0.1], [0.2, 0.2], [0.6, 0.1]])
    Interaction(
        np.array(["web/a", "web/b", "code/c"]), np.array(["chat", "goal"]), serves, serves - half,
        serves + half, 0.95,
    ).write(run)  # fmt: skip
    text, pictures = executed(run, monkeypatch)
    lines = text.splitlines()
    at = lines.index(" 73.0%  web  (no interval)")
    assert lines[at + 1] == " 27.0%  code  (21.0% to 34.0%)" and "sources)" not in text
    told = {line for line in lines if line.endswith((" for chat", " for goal"))}
    known = {"+1.00  web/a for chat", "-0.50  web/a for goal", "+0.50  code/c for goal"}
    assert told == known, "and of the other pairs nothing is known"
    assert pictures == 4 and "interactions: true" not in text


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
