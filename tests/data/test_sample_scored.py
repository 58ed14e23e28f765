"""`sample --min-score` and `--top`: which rows the scores of single examples leave to be drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scalebio.commands import sample as sample_command
from megatron_scalebio.data.example_weights import ExampleWeights
from megatron_scalebio.errors import UserError
from tests.data.sample_world import World

SIZES = {"big": 40, "small": 10}


def searched(world: World, **changes: Any) -> Path:
    """The folder of a run that scored both sources: row k of `big` has k / 10, of `small` −k."""
    run = world.root / "run"
    run.mkdir(exist_ok=True)
    folders = {name: world.root / "data" / name for name in SIZES}
    entries = [{"name": n, "path": str(f / "tokens"), "weight": 0.5} for n, f in folders.items()]
    (run / "weights.json").write_text(json.dumps({"sources": entries}))
    prints = [json.loads((f / "source.json").read_text())["fingerprint"] for f in folders.values()]
    scores = np.concatenate([np.arange(40) / 10, -np.arange(10.0)]).astype(np.float32)
    given: dict[str, Any] = {
        "sources": np.array(list(SIZES)), "fingerprints": np.array(prints),
        "offsets": np.array([0, 40, 50]), "score": scores, "visits": np.ones(50, np.int32),
        "standard_error": np.zeros(50, np.float32),
    }  # fmt: skip
    ExampleWeights(**{**given, **changes}).write(run)
    return run


def drawn(world: World, *words: str) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser()
    sample_command.add_arguments(parser)
    out = world.root / "out"
    given = ["--out", str(out), "--num-samples", "20", "--max-epochs", "9", "--overwrite", *words]
    assert sample_command.run(parser.parse_args(given)) == 0
    return json.loads((out / "manifest.json").read_text())["sources"]


def test_rows_that_score_enough_are_drawn_and_the_others_counted(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(searched(world))
    big, small = drawn(world, "--weights", run, "--min-score", "-2")
    assert (big["not_selected"], small["not_selected"]) == (0, 7)
    assert set(small["taken"]) == {0, 1, 2} and small["usable"] == 3
    said = capsys.readouterr()
    assert "7 not selected" in said.out and not said.err
    big, small = drawn(world, "--weights", run, "--top", "0.25")
    assert set(big["taken"]) == set(range(30, 40)) and big["not_selected"] == 30
    assert set(small["taken"]) == {0, 1, 2}, "a share is rounded up"


def test_rows_never_visited_are_told_and_a_source_without_any_is_kept(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    score = np.concatenate([np.full(40, -1.0), np.full(10, np.nan)]).astype(np.float32)
    visits = np.concatenate([np.ones(38), np.zeros(12)]).astype(np.int32)
    run = str(searched(world, score=score, visits=visits))
    big, small = drawn(world, "--weights", run, "--min-score", "0")
    assert (big["not_selected"], small["not_selected"], small["given"]) == (40, 0, 20)
    assert "12 of its examples were never visited" in capsys.readouterr().err
    big, small = drawn(world, "--weights", run, "--top", "0.5")
    assert (big["not_selected"], small["not_selected"]) == (20, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top", "0"], r"--top: must be above 0 and at most 1, not 0"),
        (["--top", "1.5"], r"--top: must be above 0 and at most 1, not 1\.5"),
        (["--min-score", "nan"], r"--min-score: must be a finite number, not nan"),
        (["--min-score", "0", "--top", "0.5"], r"--top: does not go with --min-score"),
        (["--top", "0.5", "--input", "big={data}/small"], r"small: has changed since the scores"),
        (["--top", "0.5", "--input", "big={raw}"], r"'big' is not a prepared folder"),
    ],
)
def test_what_the_scores_are_not_of_is_refused(world: World, words: list[str], said: str) -> None:
    run = str(searched(world))
    places = {"data": world.root / "data", "raw": world.big}
    with pytest.raises(UserError, match=said):
        drawn(world, "--weights", run, *(word.format(**places) for word in words))


def test_a_run_without_scores_is_refused(world: World) -> None:
    run = searched(world, sources=np.array(["big", "other"]))
    with pytest.raises(UserError, match="has no scores of source 'small'"):
        drawn(world, "--weights", str(run), "--top", "0.5")
    (run / "example_weights.npz").unlink()
    with pytest.raises(UserError, match="has no scores of single examples"):
        drawn(world, "--weights", str(run), "--top", "0.5")
    names = [f"--input={name}={world.root / 'data' / name}" for name in SIZES]
    with pytest.raises(UserError, match=r"--min-score and --top: need a run with scores"):
        drawn(world, "--weights", "big=1", "small=1", *names, "--top", "0.5")
