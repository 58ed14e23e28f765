"""Several validation sets: worst case, bounds and what serves what, from the command line on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scalebio.logs.interactions import read_interaction
from tests.commands import command, found_weights, metrics, note, refused, write_config
from tests.distributed.harness import run_distributed
from tests.markov import draw, transition_matrices, write_source

pytestmark = pytest.mark.distributed
SETS = ("first", "second")


def on_one_rank(folder_name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    sources = [{"name": f"s{i}", "path": str(folder / "data" / f"s{i}")} for i in range(2)]

    def run(name: str, held: dict[str, Any], *words: object, **bilevel: Any) -> None:
        sets = [{"name": each, "path": str(folder / "data" / each)} for each in SETS]
        sets[1].update(held)
        sections = {"bilevel": bilevel, "checkpoint": {"save_interval": 0}}
        config = write_config(folder / f"{name}.yaml", sources, sets, **sections)
        argv = ("reweight", "--config", config, "--output", folder / name, *words)
        note(folder / "noted", name, command(*argv))

    worst = {"objective": "worst_case"}
    run("worst", {"reference_loss": 0.5}, "--train-iters", 30, **worst)
    run("bound", {"max_loss_rise": 0.0}, "--train-iters", 30)
    run("broken", {"max_loss": 0.01})
    turns = ("--train-iters", 70, "--resync-interval", 2)
    run("turns", {}, *turns, "--interactions")
    run("too short", {"path": sources[1]["path"]}, "--interactions")
    run("bad both", {"max_loss": 1.0, "max_loss_rise": 0.1})
    run("bad reference", {"reference_loss": 1.0})
    run("bad worst", {"max_loss": 1.0}, **worst)
    run("bad turns", {}, "--interactions", resync_interval=None)
    run("bad method", {}, "--method", "doge", **worst)
    run("bad held", {"max_loss": 1.0}, "--method", "doge")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, and for each a validation set of its own."""
    folder = tmp_path_factory.mktemp("goals")
    matrices = transition_matrices(2, 0)
    for i in range(2):
        for name, seed in ((f"s{i}", 8), (SETS[i], 9)):
            rows = draw(matrices, np.full(80, i), 17, (0, seed, i))
            write_source(folder / "data", name, list(rows))
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def test_the_worst_case_moves_to_the_set_that_is_worst_off(folder: Path) -> None:
    content, said = found_weights(folder, "worst")
    first, second = content["validation"]
    assert content["objective"] == "worst_case"
    assert first["reference_loss"] == first["start_loss"] and second["reference_loss"] == 0.5
    path = np.array([record["validation_weights"] for record in metrics(folder / "worst")])
    assert path[0].tolist() == [0.5, 0.5] and path[-1, 1] > 0.6
    assert second["weight"] == pytest.approx(path[15:, 1].mean())
    [line] = [line for line in said.splitlines() if line.startswith("second ")]
    assert line.split()[2:] == [f"{second[k]:.4f}" for k in ("start_loss", "loss")] + ["0.5000"]
    page = (folder / "worst" / "report.html").read_text()
    assert "worst off against its reference" in page and f"{second['loss']:.4f}" in page


def test_losses_are_those_of_whole_sets(folder: Path) -> None:
    for name in ("worst", "bound"):  # of the same start, whatever the steps are
        starts = [entry["start_loss"] for entry in found_weights(folder, name)[0]["validation"]]
        assert starts == [e["start_loss"] for e in found_weights(folder, "broken")[0]["validation"]]
        batch = metrics(folder / name)[0]["validation_losses"]
        assert batch == pytest.approx(starts, abs=0.05)


def test_a_set_with_a_bound_is_no_goal(folder: Path) -> None:
    content, said = found_weights(folder, "bound")
    held = content["validation"][1]
    assert held["max_loss"] == held["start_loss"] > held["loss"]
    assert metrics(folder / "bound")[0]["validation_weights"] == [1.0, 0.0]
    for record in metrics(folder / "bound"):  # it is looked at all the same
        assert None not in record["validation_losses"]
    assert f"at most {held['max_loss']:.4f}" in said
    assert "goal     mean of first; second at most 0 above its start" in said
    page = (folder / "bound" / "report.html").read_text()
    assert "A set with a bound is not a goal" in page


@pytest.mark.parametrize(("name", "known"), [("bound", False), ("turns", True)])
def test_wandering_of_fewer_than_twenty_steps_is_no_interval(
    folder: Path, name: str, known: bool
) -> None:
    """Half of 30 steps are averaged, and half of 70."""
    sources = found_weights(folder, name)[0]["sources"]
    assert [entry["ci_low"] is not None for entry in sources] == [known] * 2


def test_a_bound_that_is_not_kept_is_said(folder: Path) -> None:
    content, said = found_weights(folder, "broken")
    assert not content["converged"] and "above its bound of 0.0100" in content["reason"]
    assert "not converged: the loss of second is" in said
    assert metrics(folder / "broken")[-1]["validation_weights"][1] > 0


def test_what_serves_what_is_written_and_shown(folder: Path) -> None:
    _, said = found_weights(folder, "turns")
    found = read_interaction(folder / "turns")
    assert found is not None and found.validation.tolist() == list(SETS)
    assert (found.low < found.serves).all() and (found.serves < found.high).all()
    assert "source serves set" in said and "interaction.npz" in said
    page = (folder / "turns" / "report.html").read_text()
    assert "Which source serves which validation set" in page
    assert f"{found.scaled[0, 0]:+.2f}" in page
    shares = [record["validation_weights"] for record in metrics(folder / "turns")]
    assert {tuple(each) for each in shares} == {(0.75, 0.25), (0.25, 0.75)}
    turned = json.loads((folder / "turns" / "weights.json").read_text())["validation"]
    assert [each["weight"] for each in turned] == pytest.approx([0.5, 0.5])


def test_too_few_steps_to_tell_are_said(folder: Path) -> None:
    _, said = found_weights(folder, "too short")
    assert "validation set 'second' holds the examples of source 's1'" in said
    assert "interactions: too few steps" in said
    assert not (folder / "too short" / "interaction.npz").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad both", "max_loss_rise: 0.1 and max_loss exclude each other"),
        ("bad reference", "data.validation: 'second' has a reference_loss, which worst_case alone"),
        (
            "bad worst",
            "bilevel.objective: 'worst_case' needs two or more validation sets without a bound",
        ),
        ("bad turns", "bilevel.interactions: True needs steps at which u is reset"),
        ("bad method", "bilevel.objective: the method 'doge' does not support it"),
        (
            "bad held",
            "data.validation: the bound of 'second': the method 'doge' does not support it",
        ),
    ],
)
def test_what_can_not_be_asked_is_one_line(folder: Path, name: str, words: str) -> None:
    refused(folder, name, words)
