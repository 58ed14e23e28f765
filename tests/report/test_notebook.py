"""examples/weights.ipynb runs on a run's folder, and shows what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.logs.source_table import LISTED_SOURCES, TABLE_FILE, SourceTable
from tests.commands import ROOT

NOTEBOOK = ROOT / "examples" / "weights.ipynb"
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


@pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
@pytest.mark.parametrize("grouped", [None, [f"web/{i}" for i in range(LISTED_SOURCES + 50)]])
def test_the_notebook_runs_from_top_to_bottom(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, grouped: list[str] | None
) -> None:
    import nbformat
    from nbclient import NotebookClient

    run = make_run(grouped, steps=60)
    if grouped:
        use_table(run, len(grouped))
    path = run / "weights.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["sources"]]
    path.write_text(json.dumps(content | {"indistinguishable": [names[:2]]}))
    monkeypatch.setenv("RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120).execute()
    text = said(notebook)
    assert "The mixture has settled" in text and "- Use the weights." in text
    assert f"only their sum is known: {names[0]}, {names[1]}" in text
    heaviest = max(content["sources"], key=lambda entry: entry["weight"])["name"]
    assert f"--weights {heaviest}=" in text
    assert not grouped or f"web  ({len(names)} sources)" in text
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", [])
                if "image/png" in out.get("data", {})]  # fmt: skip
    assert len(pictures) == 3


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)
